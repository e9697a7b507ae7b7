"""Validation pictures are those of the UNet in training, from each stage's own prompts."""

from pathlib import Path

import torch

from adapters import Sampling, load_cascade
from finetune.data.captions import CaptionCache, collect_captions, embed_captions
from finetune.recipe.schema import Recipe
from finetune.run.validation import Validator, sample_stage_1
from finetune.step.stages import STAGES
from tests.builders.drawing import largest_difference
from tests.builders.random_cascade import RandomCascade

PROMPTS = ["a sks cat", "a sks dog"]
SAMPLING = {"stage_1": {"timesteps": "fast27"}, "stage_2": {"steps": 2}}


def test_stage_2_has_its_own_prompts(random_cascade: RandomCascade, tmp_path: Path) -> None:
    folders = (str(random_cascade.stage_1), str(random_cascade.stage_2))
    own = {"prompts": PROMPTS, "stage_2_prompts": ["a cat", "a dog"]}
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "base": dict(zip(("stage_1", "stage_2"), folders, strict=True)),
            "data": {"source": "unread", "prompt": "a sks cat"},
            "stage_2": {"steps": 1},
            "validation": {**own, "sampling": SAMPLING, "seed": 3},
            "cache_dir": str(tmp_path),
        }
    )
    cpu = torch.device("cpu")
    embeds = embed_captions(collect_captions(recipe, ()), CaptionCache.of(recipe, cpu))
    cascade = load_cascade(*folders, device="cpu")
    unet = cascade.stages[2].unet
    settings, base = recipe.validation, recipe.base
    rows = sample_stage_1(settings, base, embeds, recipe.precisions_on(cpu), cpu, [])
    [shown] = Validator(settings, base, STAGES[2], unet, embeds, rows).sample()
    options = {"seed": 3, "sampling": Sampling(**SAMPLING), "progress": False}
    expected = cascade(PROMPTS, stage_2_prompt=["a cat", "a dog"], **options)
    without = cascade(PROMPTS, **options)
    assert list(shown.row.prompts) == PROMPTS
    for image, same, other in zip(shown.pictures, expected.final, without.final, strict=True):
        assert largest_difference(image, same) <= 1
        assert largest_difference(image, other) > 1
