"""Types of the fields that hold lists of prompts."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from finetune.recipe.prompt_lists import SUBJECT, read_prompts


def _check_one_for_each(prompts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    others = info.data.get("prompts", prompts)  # absent if they have a mistake themselves
    if len(prompts) != len(others):
        raise ValueError(f"must be one for each of the {len(others)} prompts (got {len(prompts)})")
    return prompts


def read_list(field: str) -> BeforeValidator:
    """Make a validator that reads a list by name, and puts another field's text in for ``{}``."""

    def read(prompts: Any, info: ValidationInfo) -> Any:
        listed = read_prompts(prompts) if isinstance(prompts, str) else prompts
        if not isinstance(listed, list | tuple):
            return listed  # pydantic reports it
        subject = info.data.get(field, SUBJECT)  # absent if it has a mistake itself
        return [p.replace(SUBJECT, subject) if isinstance(p, str) else p for p in listed]

    return BeforeValidator(read)


Prompts = Annotated[tuple[str, ...], Field(strict=False)]
StagePrompts = Annotated[Prompts, AfterValidator(_check_one_for_each)]
SubjectPrompts = Annotated[Prompts, read_list("identifier")]
