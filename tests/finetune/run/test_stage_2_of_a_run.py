"""Stage II in a run with Stage I: what its validation enlarges, and the pictures both share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adapters import Parts, Sampling, load_cascade, read_info
from adapters.files.model_card import write_card
from finetune.data.pictures import load_pictures
from finetune.recipe.schema import Data
from finetune.run.figures import CLIP_I
from finetune.run.folders import Folders
from finetune.run.validation import DrawnRow, Validator
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import (
    PROMPTS,
    flat,
    made_batches,
    material_of,
    recipe_of,
    saved_weights,
    train,
)

SAMPLING = {
    "stage_1": {"steps": 2, "guidance": 3.0},
    "stage_2": {"steps": 2, "noise_level": 30},
}


@pytest.mark.parametrize("stages", [(1, 2), (2,)])
def test_stage_2_enlarges_what_the_runs_own_stage_1_draws(
    random_cascade: RandomCascade,
    tmp_path: Path,
    stages: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = list(PROMPTS[1:3])
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        stages=stages,
        stage={"steps": 2},
        optimizer={"learning_rate": 0.2},
        validation={"prompts": prompts, "seed": 7, "sampling": SAMPLING, "every": 100},
    )
    adapters = []
    if 1 in stages:
        train(recipe)
        adapters = [Folders(recipe.folder).adapters]
    material, validators = material_of(recipe), []

    def look(validator: Validator) -> list[DrawnRow]:
        validators.append(validator)
        return []

    monkeypatch.setattr(Validator, "sample", look)
    train(recipe, 2)
    shown, photos = validators[0].rows
    assert shown.low_res is not None
    assert photos.prompts == tuple(picture.caption for picture in material.pictures)

    def drawn(adapters: list[Path]) -> torch.Tensor:
        first = load_cascade(
            random_cascade.stage_1, adapters=adapters, device="cpu", parts=Parts(text_encoder=False)
        )
        return first(
            prompts,
            embeds=material.prompt_embeds,
            seed=[7, 8],
            sampling=Sampling(**SAMPLING),
            progress=False,
        ).low_res

    torch.testing.assert_close(shown.low_res, drawn(adapters), rtol=0, atol=1e-5)
    if adapters:
        assert (shown.low_res - drawn([])).abs().max() > 0.05


def test_the_best_of_stage_2_alone_is_exported_with_a_card_that_works(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn is enlarged from the base's Stage I, which the card cannot assume."""
    prompt = 'a sks dog "at sea"'
    recipe = recipe_of(
        random_cascade,
        tmp_path,
        stages=(2,),
        stage={"steps": 3},
        validation={
            "prompts": ["a sks dog"],
            "loss_pictures": 0,
            "every": 1,
            "sampling": SAMPLING,
            "best": {"keep_others": None},
        },
        evaluation={"identifier": "sks dog", "subject": "dog", "prompts": [prompt]},
    )
    likeness = iter([0.1, 0.3, 0.6, 0.2])
    weights = train(recipe, 2, score=lambda drawn: {CLIP_I: [next(likeness)] * 4})
    assert torch.equal(flat(weights), saved_weights(recipe, 2)[2])
    folder = Folders(recipe.folder).adapters
    info = read_info(folder / "stage_2").model_copy(update={"prompts": (prompt,)})
    snippet = write_card(folder, [info]).read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    Image.new("RGB", (16, 16), "red").save("picture_of_stage_1.png")
    assert 'sampling="as_trained"' in snippet
    drawn: dict[str, Any] = {}
    exec(snippet.replace("seed=0", "seed=0, progress=False"), drawn)
    assert drawn["pictures"][0].size == (64, 64)


def test_pictures_do_not_depend_on_what_is_cached(tmp_path: Path) -> None:
    """A photo large enough that each stage's copy of it is reduced by another factor."""
    source = tmp_path / "photos"
    source.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (700, 640, 3), dtype=np.uint8)).save(source / "0.png")
    data = Data(source=str(source), prompt="a sks dog")
    sizes = (8, 64, 16)
    alone = [load_pictures(data, tmp_path / str(size), size)[0].pixels for size in sizes]
    shared = [load_pictures(data, tmp_path / "shared", size)[0].pixels for size in sizes]
    assert len({pixels.shape for pixels in alone}) == len(sizes)
    for own, ours in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(own, ours)


def test_stage_2_trains_on_pictures_of_stage_1s_size(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    batch = made_batches(recipe_of(random_cascade, tmp_path, stages=(2,)), 2)(0)
    assert batch.low_res is not None
    assert batch.low_res.shape[-2:] == (16, 16)
    assert batch.pixels.shape[-2:] == (64, 64)
