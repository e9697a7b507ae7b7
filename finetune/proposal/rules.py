"""The settings to start from: one table, read from top to bottom.

Every figure is one of the shipped recipes', whose outcome, memory and time are in
``benchmarks/RESULTS.md``.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

RARE_WORD = "sks"
"""The word before the subject's that makes it this one, unless the user gives others."""

SMALL_TEXT_WIDTH = 1000
"""The width of text encodings below which a base is of the embedded cascade's size; T5-XXL's, which
all published models take, is 4096."""

FEW_PICTURES, MANY_PICTURES = 3, 30
"""The numbers of a subject's pictures below and above which something is said."""

LIVING = {
    *("animal", "baby", "bear", "bird", "boy", "bunny", "butterfly", "calf", "camel", "cat"),
    *("chicken", "child", "cow", "deer", "dog", "dolphin", "dragon", "duck", "elephant", "face"),
    *("fish", "fox", "frog", "girl", "goat", "goose", "hamster", "hedgehog", "hen", "horse"),
    *("insect", "kitten", "koala", "lamb", "lion", "lizard", "man", "mouse", "monkey", "octopus"),
    *("owl", "panda", "parrot", "penguin", "person", "pig", "pony", "puppy", "rabbit", "rat"),
    *("rooster", "sheep", "snail", "snake", "spider", "squirrel", "tiger", "turtle", "whale"),
    *("wolf", "woman", "zebra"),
}
"""Words for living subjects, which wear other things and stand in other places than objects do."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The facts about a run before it has a recipe."""

    pictures: int
    captioned: bool
    """True if the pictures' own captions are trained on."""
    subject: str | None
    """The subject in plain words; ``None``: a style, or whatever the captions say."""
    alive: bool = False
    """True if the subject is a living being."""
    memory_gb: float | None = None
    """The memory of the GPU, as cards are sold; ``None``: there is no GPU, or any will do."""
    embedded: bool = False
    """True for the embedded cascade, or a base of its size."""


@dataclass(frozen=True)
class Rule:
    """Settings for some cases."""

    when: Callable[[Case], bool]
    settings: Mapping[str, Any]
    """The settings, by dotted key."""
    why: str = ""
    """The reason, for the user; empty: it goes without saying."""


def _stages(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give both stages some settings."""
    return {f"stage_{stage}.{key}": value for stage in (1, 2) for key, value in settings.items()}


def _published(case: Case) -> bool:
    return not case.embedded


def _below(memory_gb: float) -> Callable[[Case], bool]:
    """Make a condition: the base is a published one, and its GPU has less than some memory.

    Cards report a little less than they are sold with, so limits are half a GB lower.
    """

    def check(case: Case) -> bool:
        return _published(case) and case.memory_gb is not None and case.memory_gb < memory_gb

    return check


RULES = (
    # the base
    Rule(
        _published,
        {
            "base.stage_1": "DeepFloyd/IF-I-XL-v1.0",
            "base.stage_2": "DeepFloyd/IF-II-L-v1.0",
            "base.variant": "fp16",
        },
        "the largest published models, which draw best",
    ),
    Rule(
        _below(5.5),
        {"base.stage_1": "DeepFloyd/IF-I-L-v1.0", "base.stage_2": "DeepFloyd/IF-II-M-v1.0"},
        "smaller models, as the largest need 6 GB",
    ),
    # a subject
    Rule(
        lambda case: _published(case) and case.subject is not None,
        {
            "stage_1.steps": 1000,
            "stage_2.steps": 500,
            "stage_2.noise_level": [0, 250],
            **_stages(
                {
                    "batch_size": 4,
                    "adapter": {"rank": 8, "alpha": 8, "targets": "attention"},
                    "optimizer": {
                        "learning_rate": 1e-4,
                        "schedule": "cosine",
                        "warmup_steps": 50,
                    },
                }
            ),
            "data.prompt": "a photo of a {}",
            "validation.every": 250,
            "validation.sampling": {"stage_1": {"steps": 50}, "stage_2": {"noise_level": 100}},
            "evaluation": {
                "other_prompts": "others",
                "class_prompts": ["a photo of a {}"],
                "pictures_per_prompt": 4,
            },
        },
        "a subject of a few pictures: 1,000 steps of Stage I and 500 of Stage II at rank 8",
    ),
    Rule(
        lambda case: _published(case) and case.subject is not None,
        {"prior": {"kind": "output", "prompts": "everyday", "weight": 0.5}},
        "the base's own output is preserved under everyday captions, which needs no class pictures",
    ),
    Rule(
        lambda case: _published(case) and case.subject is not None,
        _stages({"timesteps": {"density": "beta", "shape": [2, 1]}}),
        "timesteps drawn towards the noisy end, which teach a subject sooner",
    ),
    Rule(
        lambda case: _published(case) and case.subject is not None and not case.alive,
        {"evaluation.prompts": "objects"},
        "prompts for a thing; --kind living has those for a living being",
    ),
    Rule(
        lambda case: _published(case) and case.subject is not None and case.alive,
        {"evaluation.prompts": "live"},
        "prompts for a living being; --kind object has those for a thing",
    ),
    # a captioned dataset
    Rule(
        lambda case: _published(case) and case.subject is None,
        {
            "stage_1.steps": 5000,
            "stage_1.batch_size": 16,
            "stage_2.steps": 2500,
            "stage_2.batch_size": 8,
            "stage_2.gradient_checkpointing": True,
            **_stages(
                {
                    "adapter": {"rank": 16, "alpha": 16, "targets": "attention"},
                    "optimizer": {"learning_rate": 1e-4, "schedule": "one_cycle"},
                    "ema_decay": 0.999,
                }
            ),
            "data.horizontal_flip": True,
            "validation.every": 500,
            "validation.sampling": {"stage_1": {"steps": 50}, "stage_2": {"noise_level": 100}},
        },
        "a captioned dataset: 5,000 and 2,500 steps at rank 16, with an average of the weights",
    ),
    # a smaller card
    Rule(
        _below(15.5),
        {"text.precision": "nf4", **_stages({"precision": "nf4"})},
        "every frozen model in NF4, as bf16 needs 16 GB",
    ),
    Rule(
        lambda case: _below(15.5)(case) and case.subject is None,
        {
            "stage_1.batch_size": 4,
            "stage_1.accumulation": 4,
            "stage_2.batch_size": 4,
            "stage_2.accumulation": 2,
            "validation.sampling.batch_size": 2,
        },
        "smaller batches, accumulated",
    ),
    Rule(
        _below(7.5),
        {
            "stage_2.batch_size": 2,
            "stage_2.accumulation": 2,
            "validation.sampling.batch_size": 2,
        },
        "Stage II in batches of 2, as batches of 4 need 8 GB",
    ),
    Rule(
        _below(4.5),
        {"text.device": "cpu"},
        "the text encoder on the CPU, as it needs 4 GB",
    ),
    # the embedded cascade
    Rule(
        lambda case: case.embedded,
        {
            "stage_1.steps": 300,
            "stage_1.batch_size": 4,
            "stage_1.adapter": {"rank": 16, "targets": "attention+conv"},
            "stage_1.optimizer": {"learning_rate": 1.5e-3, "schedule": "cosine"},
            "stage_1.checkpoint_every": 150,
            "stage_2.steps": 50,
            "stage_2.batch_size": 2,
            "stage_2.adapter": {"rank": 8, "targets": "attention+conv"},
            "stage_2.optimizer": {"learning_rate": 1e-3, "schedule": "cosine"},
            "stage_2.checkpoint_every": 50,
            "validation.every": 150,
            "validation.sampling": {
                "stage_1": {"steps": 15, "guidance": 3.0},
                "stage_2": {"steps": 10, "guidance": 1.0, "noise_level": 100},
            },
        },
        "the quickstart's settings: a small base takes a higher rate, and its convolutions too",
    ),
    Rule(
        lambda case: case.embedded and case.subject is not None,
        {
            "prior": {"kind": "output", "prompts": "everyday", "weight": 0.5},
            **_stages({"timesteps": {"density": "beta", "shape": [3, 1]}}),
            "data.prompt": "a {}",
            "validation.prompts": [
                "a {} on a purple background",
                "a {} on a red striped background",
            ],
            "validation.other_prompts": [
                "a cat face on a green background",
                "a pizza on a yellow dotted background",
            ],
            "evaluation": {
                "prompts": [
                    "a {} on a black background",
                    "a {} on a purple striped background",
                    "a {} on a pink checkered background",
                    "a {} on an orange background",
                ],
                "other_prompts": [
                    "a cat face on a blue striped background",
                    "a pizza on a green background",
                    "an apple on a purple background",
                    "a ship on a yellow dotted background",
                ],
                "sampling": {
                    "stage_1": {"steps": 25, "guidance": 3.0},
                    "stage_2": {"steps": 10, "guidance": 1.0, "noise_level": 100},
                },
            },
        },
        "the base's own output is preserved under captions of its world",
    ),
)
"""The settings; those of a later row replace those of an earlier one."""


def choose_settings(case: Case) -> tuple[dict[str, Any], list[str]]:
    """Choose the settings of a case.

    Returns:
        The tree of a recipe, and the reasons in the order of the rules.
    """
    applied = [rule for rule in RULES if rule.when(case)]
    tree: dict[str, Any] = {}
    for dotted, value in _flatten(applied):
        _put(tree, dotted.split("."), value)
    return tree, [rule.why for rule in applied if rule.why]


def _flatten(rules: list[Rule]) -> Iterator[tuple[str, Any]]:
    for rule in rules:
        yield from deepcopy(dict(rule.settings)).items()


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Put a value at a path in a tree."""
    *parents, last = path
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value
