"""Any text, as a recipe or an override, ends in a recipe or in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import UserError
from finetune.recipe.file import load_recipe
from finetune.recipe.reference import list_paths
from finetune.recipe.schema import Recipe
from finetune.recipe.yaml12 import read_yaml
from tests.builders import ROOT
from tests.builders.recipes import write

SMALL_BUDGET = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LONGEST = 20_000
"""The most letters of a message, of which there are 30 lines."""

RIGHT = (ROOT / "recipes/dreambooth_cascade.yaml").read_text(encoding="utf-8")
PATHS = st.sampled_from(list_paths())
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**30, -(10**30), 2**63]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
MARKS = st.text(alphabet="[]{}:,-&*!|>%@#?'\"\\\n\t =<~0123456789.abcnxeyi", max_size=30)


def load(path: Path, *overrides: str) -> None:
    """Load a recipe, which is right and can be written and read again, or refused in words."""
    recipe, sentence = None, ""
    try:
        recipe = load_recipe(path, overrides)
    except UserError as error:
        sentence = str(error)
    if recipe is None:
        assert 0 < len(sentence) < LONGEST
        assert "\n" not in sentence or " mistakes:\n" in sentence
    else:
        assert Recipe.model_validate(read_yaml(recipe.to_yaml())) == recipe


@pytest.fixture
def right(tmp_path: Path) -> Path:
    return write(tmp_path, RIGHT)


@SMALL_BUDGET
@given(text=st.one_of(st.text(), MARKS))
def test_any_text_is_a_recipe_or_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    load(file)


@SMALL_BUDGET
@given(start=st.integers(0, len(RIGHT)), removed=st.integers(0, 40), put=MARKS)
def test_a_mutated_recipe_is_right_or_is_refused(
    start: int, removed: int, put: str, tmp_path: Path
) -> None:
    load(write(tmp_path, RIGHT[:start] + put + RIGHT[start + removed :]))


@SMALL_BUDGET
@given(path=PATHS, value=VALUES)
def test_any_value_of_a_field_is_right_or_is_refused(path: str, value: Any, right: Path) -> None:
    load(right, f"{path}={json.dumps(value)}")


@SMALL_BUDGET
@given(path=st.one_of(PATHS, st.text()), text=st.one_of(st.text(), MARKS))
def test_any_override_is_right_or_is_refused(path: str, text: str, right: Path) -> None:
    load(right, f"{path}={text}")
