"""Batches are functions of (seed, position in the run), and hold what their stage needs."""

import math
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.batches import Batches, picture_at, prefetch
from finetune.data.pictures import Picture
from finetune.recipe.schema import Data, OutputPrior, PicturePrior, Timesteps
from finetune.step.inputs import Batch

CPU = torch.device("cpu")


def pictures(folder: Path, count: int, caption: str) -> list[Picture]:
    rng = np.random.default_rng(0)
    made = [Picture(folder / f"{caption}_{i}.npy", f"{caption} {i}", "") for i in range(count)]
    for picture in made:
        np.save(picture.file, rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    return made


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    instances, classes = pictures(tmp_path, 5, "subject"), pictures(tmp_path, 3, "class")
    captions = ["", *(p.caption for p in instances + classes)]
    return Batches(
        data=Data(source="x"),
        pictures=instances,
        class_pictures=classes,
        prior=PicturePrior(prompts=("class",), weight=0.5, share=0.4),
        prompt_embeds={c: torch.full((4, 2), float(i)) for i, c in enumerate(captions)},
        batch_size=5,
        size_px=32,
        low_res_px=8,
        noise_level=(100, 120),
        num_train_timesteps=1000,
        seed=3,
    )


def test_a_batch_is_a_function_of_its_index(batches: Batches) -> None:
    in_turn = list(prefetch(batches, range(4, 9), CPU))
    for index, batch in zip(range(4, 9), in_turn, strict=True):
        again = replace(batches)(index).tensors()
        assert all(torch.equal(tensor, again[name]) for name, tensor in batch.tensors().items())


def test_on_a_cpu_no_other_thread_makes_batches(batches: Batches) -> None:
    # it would compute beside the steps, whose own threads then sleep between their operations
    makers = []

    class Watched(Batches):
        def __call__(self, index: int) -> Batch:
            makers.append(threading.get_ident())
            return super().__call__(index)

    watched = Watched(**{each.name: getattr(batches, each.name) for each in fields(batches)})
    assert len(list(prefetch(watched, range(5), CPU))) == 5
    assert set(makers) == {threading.get_ident()}


@pytest.mark.gpu
def test_a_batch_stays_until_a_gpu_that_runs_behind_has_seen_it(batches: Batches) -> None:
    seen = []
    for batch in prefetch(batches, range(20), torch.device("cuda")):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        seen.append({name: tensor.clone() for name, tensor in batch.tensors().items()})
        del batch
    for index, tensors in enumerate(seen):
        expected = batches(index).tensors()
        assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("change", [{"rank": 1, "world_size": 2}, {"seed": 4}])
def test_ranks_and_seeds_draw_apart(batches: Batches, change: dict[str, int]) -> None:
    ours, theirs = batches(0), replace(batches, **change)(0)
    assert not torch.equal(ours.noise, theirs.noise)
    assert not torch.equal(ours.timesteps, theirs.timesteps)


def test_steps_draw_apart(batches: Batches) -> None:
    assert not torch.equal(batches(0).noise, batches(1).noise)


def test_every_draw_is_its_own(batches: Batches) -> None:
    batch = batches(0)
    assert batch.low_res_noise is not None
    assert not torch.equal(batch.noise, batch.low_res_noise)


def test_each_epoch_shows_every_picture_once() -> None:
    for epoch in range(3):
        shown = [picture_at(position, 7, seed=1) for position in range(epoch * 7, epoch * 7 + 7)]
        assert sorted(shown) == list(range(7))
    first, second = ([picture_at(p + e * 7, 7, seed=1) for p in range(7)] for e in (0, 1))
    assert first != second


def shown(batches: Batches, index: int) -> list[str]:
    """The captions of the pictures of a batch."""
    return [batches.picture(*place)[0].caption for place in batches.places(index)]


def test_ranks_share_an_epoch(batches: Batches) -> None:
    """Two processes show disjoint pictures of one sequence, the sequence one process shows."""
    alone = replace(batches, batch_size=4)
    pair = [replace(batches, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    together = [caption for one in pair for caption in shown(one, 3)]
    assert sorted(together) == sorted(shown(alone, 3))


def global_batch(
    batches: Batches, step: int, size: int, accumulation: int, world_size: int
) -> dict[str, torch.Tensor]:
    """A step's global batch from all its parts, in an order of its own, weights averaged."""
    parts = [
        replace(
            batches, batch_size=size, accumulation=accumulation, rank=rank, world_size=world_size
        )(step * accumulation + micro_step)
        for rank in range(world_size)
        for micro_step in range(accumulation)
    ]
    assert all(len(part.pixels) == size for part in parts)
    tensors = {name: torch.cat([p.tensors()[name] for p in parts]) for name in parts[0].tensors()}
    order = tensors["dropout_keys"][:, 0].argsort()
    tensors["weight"] = tensors["weight"] / len(parts)
    return {name: tensor[order] for name, tensor in tensors.items()}


@pytest.mark.parametrize("share", [None, 0.4, 0.01, 0.99])
def test_a_global_batch_is_the_same_however_it_is_divided(
    batches: Batches, share: float | None
) -> None:
    """Also where its class pictures (5, 1 or 11 of 12) cannot be shared out evenly."""
    prior = None if share is None else PicturePrior(prompts=("class",), weight=0.5, share=share)
    batches = replace(batches, prior=prior)
    for step in (0, 3):
        whole = global_batch(batches, step, 12, 1, 1)
        for division in ((6, 2, 1), (6, 1, 2), (3, 2, 2), (3, 1, 4), (1, 12, 1), (4, 1, 3)):
            divided = global_batch(batches, step, *division)
            for name, tensor in whole.items():
                assert torch.allclose(divided[name], tensor, rtol=1e-6, atol=0), (division, name)
        weights = 1.0 if prior is None else 1.0 + prior.weight
        assert whole["weight"].sum().item() == pytest.approx(weights)


def test_what_is_drawn_belongs_to_the_position(batches: Batches) -> None:
    """Two steps of 4 pictures draw what one step of 8 does, but for the step's own key."""
    alone = replace(batches, prior=None)
    large = global_batch(alone, 1, 8, 1, 1)
    small = [global_batch(alone, step, 4, 1, 1) for step in (2, 3)]
    both = {name: torch.cat([one[name] for one in small]) for name in large}
    order = both["dropout_keys"][:, 0].argsort()
    for name in large.keys() - {"weight", "dropout_keys"}:
        assert torch.equal(both[name][order], large[name]), name
    assert torch.equal(both["dropout_keys"][order, 0], large["dropout_keys"][:, 0])
    step_keys = {int(key) for one in small for key in one["dropout_keys"][:, 1]}
    assert len(step_keys) == 2


def test_parts_differ_by_one_class_picture_at_most(batches: Batches) -> None:
    four = [replace(batches, batch_size=3, rank=rank, world_size=4) for rank in range(4)]
    for index in range(3):
        kinds = [[caption.split()[0] for caption in shown(one, index)] for one in four]
        classes = [kind.count("class") for kind in kinds]
        assert sum(classes) == 5
        assert max(classes) - min(classes) == 1


BETA_2_3 = {"density": "beta", "shape": (2.0, 3.0)}
LOGIT_NORMAL = {"density": "logit_normal", "shape": (-0.5, 0.8)}
CUMULATIVE = (
    ({}, lambda u: u),
    ({"low": 200, "high": 449}, lambda u: u),
    ({"density": "beta", "shape": (2.0, 1.0)}, lambda u: u**2),
    (BETA_2_3, lambda u: 6 * u**2 - 8 * u**3 + 3 * u**4),
    (BETA_2_3 | {"low": 900}, lambda u: 6 * u**2 - 8 * u**3 + 3 * u**4),
    (LOGIT_NORMAL, lambda u: NormalDist(-0.5, 0.8).cdf(math.log(u / (1 - u)))),
    (
        LOGIT_NORMAL | {"low": 3, "high": 102},
        lambda u: NormalDist(-0.5, 0.8).cdf(math.log(u / (1 - u))),
    ),
)


@pytest.mark.parametrize(("options", "cumulative"), CUMULATIVE)
def test_timesteps_are_distributed_as_asked(
    options: dict[str, Any], cumulative: Callable[[float], float]
) -> None:
    """By the chi-square of 25 equal parts of the range, at 5 standard deviations."""
    timesteps = Timesteps(**options)
    low, high = timesteps.low, 999 if timesteps.high is None else timesteps.high
    rng = np.random.default_rng(0)
    drawn = np.array([timesteps.draw(rng, 1000) for _ in range(20_000)])
    counts, _ = np.histogram(drawn, 25, (low, high + 1))
    assert counts.sum() == len(drawn)  # none is out of range
    edges = [0.0, *(cumulative(edge / 25) for edge in range(1, 25)), 1.0]
    expected = np.diff(edges) * len(drawn)
    likely = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[likely].sum()
    degrees = likely.sum() - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5
    assert counts[~likely].sum() < 40


def test_a_batchs_timesteps_are_those_of_the_recipe(batches: Batches) -> None:
    options = Timesteps(low=300, high=309, density="beta", shape=(3.0, 1.0))
    some = replace(batches, timesteps=options)
    drawn = torch.cat([some(index).timesteps for index in range(60)])
    assert drawn.dtype == torch.int64
    assert (drawn.min() >= 300) & (drawn.max() == 309)
    assert drawn.double().mean().item() == pytest.approx(300 + 10 * 3 / 4 - 0.5, abs=0.6)


@pytest.mark.parametrize(("share", "classes"), [(0.01, 1), (0.4, 2), (0.6, 3), (0.99, 4)])
def test_class_pictures_take_their_share(batches: Batches, share: float, classes: int) -> None:
    prior = PicturePrior(prompts=("class",), share=share)
    assert replace(batches, prior=prior).prior_count == classes


def test_the_prior_is_preserved_beside_the_subject(batches: Batches) -> None:
    captions = [caption.split()[0] for caption in shown(batches, 0)]
    assert captions == ["subject"] * 3 + ["class"] * 2
    assert torch.allclose(batches(0).weight, torch.tensor([1 / 3] * 3 + [0.5 / 2] * 2))
    alone = replace(batches, class_pictures=[], prior=None)
    assert torch.allclose(alone(0).weight, torch.full((5,), 1 / 5))


def test_captions_are_dropped_as_often_as_asked(batches: Batches) -> None:
    """Those of the subject and those of the class by themselves."""
    assert batches.prior is not None

    def empty_shares(subject: float, classes: float) -> list[float]:
        prior = batches.prior.model_copy(update={"caption_dropout": classes})
        some = replace(batches, data=Data(source="x", caption_dropout=subject), prior=prior)
        count = batches.batch_size - batches.prior_count
        empty = torch.stack([some(index).prompt_embeds[:, 0, 0] == 0 for index in range(120)])
        return [part.float().mean().item() for part in (empty[:, :count], empty[:, count:])]

    assert empty_shares(0.0, 1.0) == [0, 1]
    assert empty_shares(1.0, 0.3) == [1, pytest.approx(0.3, abs=0.08)]
    assert empty_shares(0.3, 0.1) == [pytest.approx(0.3, abs=0.08), pytest.approx(0.1, abs=0.05)]


PROMPTS = ("a cat", "a tree", "a car")


@pytest.fixture
def preserving(batches: Batches) -> Batches:
    """Batches that preserve the base's output for :data:`PROMPTS`."""
    embeds = {prompt: torch.full((4, 2), 50.0 + i) for i, prompt in enumerate(PROMPTS)}
    return replace(
        batches,
        class_pictures=[],
        prior=OutputPrior(kind="output", prompts=PROMPTS, weight=0.5, share=0.4),
        prompts=PROMPTS,
        prompt_embeds={**batches.prompt_embeds, **embeds},
    )


def test_preserved_rows_are_the_subjects_pictures_with_other_captions(preserving: Batches) -> None:
    batch = preserving(0)
    assert batch.preserved is not None
    assert batch.preserved.tolist() == [3, 4]
    assert torch.allclose(batch.weight, torch.tensor([1 / 3] * 3 + [0.5 / 2] * 2))
    rows = [preserving.picture(*place)[0] for place in preserving.places(0)]
    assert [row.caption in PROMPTS for row in rows] == [False] * 3 + [True] * 2
    files = {picture.file for picture in preserving.pictures}
    assert {row.file for row in rows} <= files
    certain = preserving.prior.model_copy(update={"caption_dropout": 1e-9})
    kept = replace(preserving, prior=certain)(0).prompt_embeds[3:, 0, 0]
    assert kept.tolist() == [50.0 + PROMPTS.index(row.caption) for row in rows[3:]]
    always = preserving.prior.model_copy(update={"caption_dropout": 1.0})
    assert replace(preserving, prior=always)(0).prompt_embeds[3:].abs().max() == 0


def test_each_epoch_preserves_every_prompt_and_every_picture_once(preserving: Batches) -> None:
    rows = [preserving.prior_picture(position) for position in range(30)]
    for epoch in range(10):
        shown = [row.caption for row in rows[3 * epoch : 3 * epoch + 3]]
        assert sorted(shown) == sorted(PROMPTS)
    for epoch in range(6):
        assert len({row.file for row in rows[5 * epoch : 5 * epoch + 5]}) == 5
    assert len({tuple(row.caption for row in rows[i : i + 3]) for i in range(0, 30, 3)}) > 2
    instances = [preserving.pictures[picture_at(p, 5, preserving.seed)].file for p in range(30)]
    assert sum(row.file == file for row, file in zip(rows, instances, strict=True)) < 15
    as_many = replace(preserving, pictures=preserving.pictures[:3])
    pairs = {(row.caption, row.file) for row in map(as_many.prior_picture, range(30))}
    assert len(pairs) > 6  # of nine; three if pictures and prompts went through one order


@pytest.mark.parametrize("share", [0.4, 0.01, 0.99])
def test_the_same_rows_are_preserved_however_a_global_batch_is_divided(
    preserving: Batches, share: float
) -> None:
    prior = preserving.prior.model_copy(update={"share": share})
    preserving = replace(preserving, prior=prior)

    def rows(step: int, size: int, accumulation: int, world_size: int) -> list[list[float]]:
        """What is preserved, row by row, in an order of its own."""
        found = []
        for rank in range(world_size):
            part = replace(
                *(preserving,),
                batch_size=size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
            )
            for index in range(step * accumulation, (step + 1) * accumulation):
                batch = part(index)
                if batch.preserved is not None:
                    shown = (batch.pixels, batch.prompt_embeds, batch.noise, batch.timesteps)
                    chosen = [
                        tensor[batch.preserved].flatten(1)
                        if tensor.dim() > 1
                        else tensor[batch.preserved, None]
                        for tensor in shown
                    ]
                    weights = batch.weight[batch.preserved, None] / part.parts
                    found += torch.cat([weights, *chosen], dim=1).tolist()
        return sorted(found)

    for step in (0, 3):
        whole = rows(step, 12, 1, 1)
        assert len(whole) == preserving.prior.count_in(12)
        for division in ((6, 2, 1), (6, 1, 2), (3, 2, 2), (1, 12, 1), (4, 1, 3)):
            assert torch.allclose(torch.tensor(rows(step, *division)), torch.tensor(whole))


def test_single_pictures_alternate_over_the_accumulation(preserving: Batches) -> None:
    prior = preserving.prior.model_copy(update={"share": 0.5})
    one = replace(preserving, prior=prior, batch_size=1, accumulation=4)
    kinds = [one(index).preserved is not None for index in range(8)]
    assert kinds == [False, False, True, True] * 2


def test_stage_2_sees_its_own_crop_shrunk(batches: Batches) -> None:
    batch = batches(0)
    assert batch.low_res is not None
    assert batch.low_res.shape == (5, 3, 8, 8)
    shrunk = torch.nn.functional.interpolate(
        batch.pixels, (8, 8), mode="bicubic", antialias=True, align_corners=False
    )
    assert (batch.low_res - shrunk.clamp(-1, 1)).abs().max() < 0.03


def test_noise_levels_fill_their_range(batches: Batches) -> None:
    levels = torch.cat([batches(index).tensors()["noise_level"] for index in range(60)])
    assert levels.min() == 100
    assert levels.max() == 120
    steps = torch.cat([batches(index).timesteps for index in range(60)])
    assert steps.float().mean().item() == pytest.approx(499.5, abs=60)


def test_stage_1_has_no_low_res_part(batches: Batches) -> None:
    assert set(replace(batches, low_res_px=None)(0).tensors()) == {
        "pixels",
        "prompt_embeds",
        "weight",
        "noise",
        "timesteps",
        "dropout_keys",
    }
