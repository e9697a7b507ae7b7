"""Mistakes that involve several sections of a recipe."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeAlias

from pydantic import BaseModel

from adapters.weights.kinds import KINDS
from finetune.step.stages import STAGES

Drawing: TypeAlias = tuple[str, int]
"""The prompt and the seed of a picture."""

Given: TypeAlias = Callable[[str], Any]
"""Looks up the value at a dotted path in a recipe's tree; ``None``: it is not there."""

KINDS_WITHOUT_B = tuple(name for name, kind in KINDS.items() if not kind.has_b)
"""The kinds of adapter without the B matrices that LoRA+ needs."""

JUDGED = {
    "clip_i": ("validation.prompts", "evaluation"),
    "clip_t": ("validation.prompts", "evaluation"),
    "held_out": ("validation.held_out",),
}
"""The figures that the best validation can be chosen by, with the fields that they need."""


def find_mistakes(tree: Any) -> Iterator[tuple[str, str]]:
    """Yield the path and message of each mistake that involves several sections.

    They are sought in the tree as given, because its sections may have mistakes of their own.
    """

    def given(path: str) -> Any:
        node = tree
        for part in path.split("."):
            node = dict(node).get(part) if isinstance(node, dict | BaseModel) else None
        return node

    yield from _mistakes_of_best(given)
    yield from _mistakes_of_bases(given)
    trained = [stage.name for stage in STAGES.values() if given(stage.name) is not None]
    if not trained:
        yield "stage_1", "nothing to train: give a stage_1 section, a stage_2 section or both"
    for stage in trained:
        yield from _mistakes_of_stage(given, stage)


def _mistakes_of_bases(given: Given) -> Iterator[tuple[str, str]]:
    """Yield the path and message of each setting that the base does not have the stage for."""
    if given("base.stage_2") is None:
        if given("stage_2") is not None:
            yield "base.stage_2", "must name a Stage II model if stage_2 is trained"
        if given("validation.through_stage_2") == "always":
            yield (
                "validation.through_stage_2",
                "always needs base.stage_2, to enlarge the pictures: give it, or never",
            )
    if given("stage_1.noise_level") is not None:
        yield "stage_1.noise_level", "is for stage_2 alone: Stage I has no augmentation to draw"


def _mistakes_of_stage(given: Given, stage: str) -> Iterator[tuple[str, str]]:
    """Yield the path and message of each setting of a stage's training that another rules out."""
    accumulation = given(f"{stage}.accumulation")
    alone = given(f"{stage}.batch_size") == 1 and accumulation in (None, 1)
    if given("prior") is not None and alone:
        yield (
            f"{stage}.batch_size",
            "must be at least 2 with prior preservation, or accumulation must be (got 1)",
        )
    warmup, steps = given(f"{stage}.optimizer.warmup_steps"), given(f"{stage}.steps")
    if isinstance(warmup, int) and isinstance(steps, int) and warmup >= steps > 0:
        yield (
            f"{stage}.optimizer.warmup_steps",
            f"must be less than {stage}.steps, or the learning rate never reaches its peak"
            f" (got {warmup} of {steps} steps)",
        )
    kind, ratio = given(f"{stage}.adapter.kind"), given(f"{stage}.optimizer.lora_plus_ratio")
    if kind in KINDS_WITHOUT_B and ratio not in (None, 1):
        yield (
            f"{stage}.optimizer.lora_plus_ratio",
            f"must be 1 with {kind}, which has no B matrices (got {ratio!r})",
        )


def _mistakes_of_best(given: Given) -> Iterator[tuple[str, str]]:
    """Yield the path and message of each setting without which no validation is the best."""
    best = given("validation.best")
    if not isinstance(best, dict | BaseModel):  # absent, or its own mistake is reported
        return
    figure = given("validation.best.figure") or "clip_i"
    for needed in JUDGED.get(figure, ()) if isinstance(figure, str) else ():
        if not given(needed):
            yield "validation.best.figure", f"{figure} needs {needed}: give it, or another figure"
    unbounded = dict(best).get("keep_others", 0.97) is None
    if not unbounded and not (given("validation.other_prompts") and given("evaluation")):
        yield (
            "validation.best.keep_others",
            "needs validation.other_prompts and evaluation, to see what is forgotten: give them, or"
            " keep_others: null",
        )


def find_absent_subject(identifier: str, prompts: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the mistake that no prompt names the subject that is to be scored."""
    if not any(identifier in prompt for prompt in prompts):
        yield (
            "evaluation.identifier",
            f"none of evaluation.prompts contains it (got {identifier!r}): give the words that name"
            " the subject there",
        )


def find_shared_pictures(
    chosen_by: Collection[Drawing], judged_by: Collection[Drawing]
) -> Iterator[tuple[str, str]]:
    """Yield the mistake that the best validation is chosen and then judged by one picture."""
    for prompt, seed in sorted({*chosen_by} & {*judged_by})[:1]:
        yield (
            "validation.seed",
            f"{prompt!r} is drawn with seed {seed} in evaluation too, whose pictures must be other"
            " than those that the best is chosen by: give another seed",
        )
