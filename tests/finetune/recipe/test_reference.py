"""The reference of recipe keys says what the schema enforces."""

from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from finetune.recipe.reference import describe_type, list_paths, list_sections
from finetune.recipe.schema import Optimizer, Recipe, Training, Validation
from finetune.step.optimizers import OPTIMIZERS


def described(model: type[BaseModel]) -> dict[str, Any]:
    (section,) = (each for each in list_sections() if each.title == model.__name__)
    return {key.name: key for key in section.keys}


def test_every_key_has_a_type_and_a_text() -> None:
    for section in list_sections():
        assert section.text, section.title
        for key in section.keys:
            assert key.type, (section.title, key.name)
            assert key.text, (section.title, key.name)


def test_every_key_of_a_dumped_recipe_has_a_path() -> None:
    tree = {
        "name": "all",
        "base": {"stage_1": "one", "stage_2": "two"},
        "data": {"source": "pictures"},
        "prior": {"prompts": ["a dog"]},
        "stage_1": {"steps": 5},
        "stage_2": {"steps": 5},
        "validation": {"held_out": 1, "best": {"figure": "held_out", "keep_others": None}},
        "evaluation": {
            "identifier": "sks dog",
            "subject": "dog",
            "prompts": ["a {}"],
            "sampling": {},
            "expected": {"data": "d", "clip_i": 0.5, "clip_t": 0.5, "spread": 0.1},
        },
    }
    recipe = Recipe.model_validate(tree)
    paths = set(list_paths())

    def check(node: dict[str, Any], path: str = "") -> None:
        for name, below in node.items():
            assert f"{path}{name}" in paths
            if isinstance(below, dict):
                check(below, f"{path}{name}.")

    check(recipe.model_dump())


def test_a_key_without_a_default_is_one_that_must_be_given() -> None:
    for section in list_sections():
        assert section.paths
    needed = {name for name, key in described(Training).items() if key.default is None}
    assert needed == {"steps"}
    with pytest.raises(ValidationError):
        Training()


def test_defaults_are_read_back_as_they_are() -> None:
    defaults = Training(steps=1)
    for name, key in described(Training).items():
        if key.default is not None and key.type != "section":
            assert yaml.safe_load(key.default) == getattr(defaults, name), name


def test_names_in_tables_are_listed() -> None:
    assert all(f"`{name}`" in described(Optimizer)["name"].type for name in OPTIMIZERS)


@pytest.mark.parametrize(
    ("key", "model", "words"),
    [
        ("batch_size", Training, "whole number (1 to 10000)"),
        ("ema_decay", Training, "number (at least 0, below 1) or null"),
        ("noise_level", Training, "list of 2 whole numbers (at least 0) or null"),
        ("through_stage_2", Validation, "`never`, `last` or `always`"),
        ("seed", Validation, "whole number (at least 0, below 2^63)"),
        ("prompts", Validation, "list of texts"),
        ("best", Validation, "section or null"),
    ],
)
def test_types_and_ranges_are_in_words(key: str, model: type[BaseModel], words: str) -> None:
    assert described(model)[key].type == words


def test_ranges_with_both_ends_are_one() -> None:
    assert describe_type({"type": "number", "minimum": 0, "maximum": 1}) == "number (0 to 1)"


def test_sections_that_share_their_keys_have_one_label() -> None:
    labels = {section.title: section.label for section in list_sections()}
    assert labels["Training"] == "stage_*"
    assert labels["Optimizer"] == "stage_*.optimizer"
    assert labels["Sampling"] == "*.sampling"
    assert labels["Best"] == "validation.best"
