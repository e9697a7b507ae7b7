"""The captions whose meaning is preserved with ``prior.kind: output``."""

from collections.abc import Iterable
from importlib.resources import files

from finetune.recipe.schema import OutputPrior

EVERYDAY = files("finetune.data") / "prompts" / "everyday.txt"
"""The captions of everyday things: animals, people, food, places, objects, styles; one a line."""


def list_prompts(prior: OutputPrior, captions: Iterable[str]) -> tuple[str, ...]:
    """List the captions that a recipe preserves.

    Args:
        prior: the recipe's section.
        captions: those of the training data, which ``prompts: data`` stands for.
    """
    if prior.prompts == "data":
        return tuple(dict.fromkeys(captions))
    if prior.prompts == "everyday":
        return tuple(EVERYDAY.read_text(encoding="utf-8").splitlines())
    return prior.prompts
