"""Recipes: strict, and every mistake reported at once."""

from pathlib import Path

import pytest
import yaml

from adapters.errors import UserError
from finetune.recipe import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
SMALL = """
name: small
base: {stage_1: one}
data: {source: pictures}
stage_1: {steps: 5}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    header = path.read_text().split("name:")[0]
    assert f"recipes/{path.name}" in header
    assert "Memory:" in header
    assert "Time:" in header


def test_the_shipped_set() -> None:
    stages = "dreambooth_stage_1 dreambooth_stage_2 dreambooth_cascade captions_stage_1"
    assert {*stages.split(), "captions_stage_2", "quickstart"} <= {path.stem for path in RECIPES}


def test_resolving_is_idempotent(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES[-1])
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    recipe = load_recipe(path, ["stage_1.steps=7", "stage_1.adapter.targets=[to_q]", "seed=3"])
    assert recipe.stage_1 is not None
    assert (recipe.stage_1.steps, recipe.stage_1.adapter.targets) == (7, ("to_q",))
    assert recipe.seed == 3


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
name: small
base: {stage_1: one}
data: {source: pictures, caption_dropout: 1.5, promt: a dog}
stage_1: {steps: many, optimizer: {name: adamw8bit}, adapter: {rnak: 4}}
sed: 3
""",
    )
    with pytest.raises(UserError) as error:
        load_recipe(path)
    message = str(error.value)
    for part in (
        "6 mistake(s)",
        "data.caption_dropout: Input should be less than or equal to 1 (got 1.5)",
        "data.promt: unknown key; did you mean prompt?",
        "stage_1.steps: Input should be a valid integer (got 'many')",
        "stage_1.optimizer: name must be one of adamw_8bit",
        "stage_1.adapter.rnak: unknown key; did you mean rank?",
        "sed: unknown key; did you mean seed?",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a YAML mapping"),
        ("name: [", "not valid YAML"),
        (SMALL.replace("stage_1: {steps: 5}", ""), "nothing to train"),
        (SMALL + "stage_2: {steps: 5}", "base.stage_2 must name"),
        (SMALL + "prior: {prompts: [a dog]}\n", None),
        (SMALL.replace("small", "../up"), "name: String should match"),
        (
            SMALL.replace("one}", "one, stage_2: two}")
            + "stage_2: {steps: 5, noise_level: [9, 3]}",
            r"noise_level must be \[low, high\]",
        ),
    ],
)
def test_whole_recipe_checks(tmp_path: Path, text: str, message: str | None) -> None:
    path = write(tmp_path, text)
    if message is None:
        load_recipe(path)
        return
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["steps", "stage_1.steps.deep=3", "seed=[1"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="override"):
        load_recipe(write(tmp_path, SMALL), [override])


def test_every_field_is_documented() -> None:
    schema = yaml.safe_dump(load_recipe(RECIPES[0]).model_json_schema())
    definitions = yaml.safe_load(schema)
    undocumented = [
        f"{name}.{field}"
        for name, section in {"Recipe": definitions, **definitions["$defs"]}.items()
        for field, content in section["properties"].items()
        if "description" not in content
    ]
    assert undocumented == []
