"""Types of the fields that hold lists of prompts."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from finetune.recipe.prompt_lists import read_prompts


def _check_one_for_each(prompts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    others = info.data.get("prompts", prompts)  # absent if they have a mistake themselves
    if len(prompts) != len(others):
        raise ValueError(f"must be one for each of the {len(others)} prompts (got {len(prompts)})")
    return prompts


def _read_list(prompts: Any) -> Any:
    """Read a list of prompts by name; pydantic reports what is no list."""
    return list(read_prompts(prompts)) if isinstance(prompts, str) else prompts


Prompts = Annotated[tuple[str, ...], Field(strict=False)]
StagePrompts = Annotated[Prompts, AfterValidator(_check_one_for_each)]
NamedPrompts = Annotated[Prompts, BeforeValidator(_read_list)]
NamedStagePrompts = Annotated[StagePrompts | None, BeforeValidator(_read_list)]
