"""All variants draw the same prompts from the same seeds, as the recipe says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import Sampling, StageSampling, load_cascade
from adapters.errors import UserError
from adapters.weights.kinds import AdapterSpec
from finetune.evaluation.drawing import check_adapters, draw_variants, list_shots
from finetune.recipe.schema import Evaluation, Recipe
from tests.builders.adapters import base_of, export, trained_unet
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of

CPU = torch.device("cpu")
FEW = Sampling(
    stage_1=StageSampling(steps=2, guidance=1.5),
    stage_2=StageSampling(steps=2, guidance=1.0),
    batch_size=3,
)
SETTINGS: dict[str, Any] = {
    "identifier": "sks dog",
    "subject": "dog",
    "prompts": ["a sks dog", "a sks dog on blue"],
    "stage_2_prompts": ["a pet", "a pet on blue"],
    "other_prompts": ["a cat"],
    "class_prompts": ["a dog"],
    "pictures_per_prompt": 2,
    "clip": "unread",
    "seed": 5,
    "sampling": FEW,
}


def adapter_of(cascade: RandomCascade, folder: Path, stage: int) -> Path:
    """A folder with an adapter of one stage."""
    base, spec = base_of(cascade, stage), AdapterSpec(rank=2)
    export(trained_unet(base, spec), folder, base, stage, spec)
    return folder


def settings_of(recipe: Recipe) -> Evaluation:
    assert recipe.evaluation is not None
    return recipe.evaluation


def evaluated(cascade: RandomCascade, folder: Path, **changes: Any) -> Recipe:
    return recipe_of(cascade, folder, evaluation=SETTINGS | changes)


def test_each_picture_has_a_seed_of_its_own(random_cascade: RandomCascade, tmp_path: Path) -> None:
    shots = list_shots(settings_of(evaluated(random_cascade, tmp_path)))
    assert [(shot.group, shot.prompt, shot.stage_2_prompt, shot.text) for shot in shots[:4]] == [
        ("subject", "a sks dog", "a pet", "a dog"),
        ("subject", "a sks dog on blue", "a pet on blue", "a dog on blue"),
        ("others", "a cat", "a cat", "a cat"),
        ("class", "a dog", "a dog", "a dog"),
    ]
    assert [shot.seed for shot in shots] == [5, 6, 7, 8, 1005, 1006, 1007, 1008]
    assert [shot.number for shot in shots] == [0] * 4 + [1] * 4
    fewer = list_shots(settings_of(evaluated(random_cascade, tmp_path, pictures_per_prompt=1)))
    assert list(fewer) == list(shots[:4])


def test_variants_differ_by_their_adapters_alone(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    one, two = (adapter_of(random_cascade, tmp_path / f"{n}", n) for n in (1, 2))
    recipe = evaluated(random_cascade, tmp_path, pictures_per_prompt=1)
    shots = list_shots(settings_of(recipe))
    adapters = {str(one): 0.5, str(two): 2.0}
    drawn = draw_variants(recipe, settings_of(recipe), shots, adapters, CPU, apart=True)
    assert list(drawn) == ["base", "fine_tuned", "stage_1", "stage_2"]
    cascade = load_cascade(random_cascade.stage_1, random_cascade.stage_2, device="cpu")
    for name, scales in {
        "base": {},
        "fine_tuned": adapters,
        "stage_1": {str(one): 0.5},
        "stage_2": {str(two): 2.0},
    }.items():
        for folder, scale in scales.items():
            cascade.add_adapter(folder, scale)
        plain = cascade(
            [shot.prompt for shot in shots],
            stage_2_prompt=[shot.stage_2_prompt for shot in shots],
            seed=[shot.seed for shot in shots],
            sampling=FEW,
            progress=False,
        )
        cascade.remove_adapters()
        for sample, wanted in zip(drawn[name], plain, strict=True):
            assert sample.seed == wanted.seed
            for stage in (1, 2):
                found = np.asarray(sample.pictures[stage], dtype=int)
                # the prompts are encoded one by one here, and together there
                assert abs(found - np.asarray(wanted.pictures[stage], dtype=int)).max() <= 1
    finals = [np.stack([np.asarray(each.final) for each in row]) for row in drawn.values()]
    for number, row in enumerate(finals):
        assert not any(np.array_equal(row, other) for other in finals[:number])
    firsts = {name: row[0].pictures[1].tobytes() for name, row in drawn.items()}
    assert firsts["base"] == firsts["stage_2"]
    assert firsts["fine_tuned"] == firsts["stage_1"]


def test_without_adapters_the_base_is_drawn_alone(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    recipe = evaluated(random_cascade, tmp_path, pictures_per_prompt=1)
    shots = list_shots(settings_of(recipe))
    assert list(draw_variants(recipe, settings_of(recipe), shots, {}, CPU, apart=True)) == ["base"]


def test_pictures_are_sampled_as_validation_is_unless_the_recipe_says_otherwise(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        evaluation=SETTINGS | {"sampling": None},
        validation={"sampling": FEW},
    )
    settings = settings_of(recipe)
    (drawn,) = draw_variants(recipe, settings, list_shots(settings)[:1], {}, CPU)["base"]
    assert drawn.info is not None
    assert drawn.info.sampling == FEW


def test_a_missing_adapter_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere has no exported adapter"):
        check_adapters({str(tmp_path / "nowhere"): 1.0})
