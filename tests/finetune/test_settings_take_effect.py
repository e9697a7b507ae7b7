"""Every setting of a recipe changes what it names, by as much as it says."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageOps
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from transformers.optimization import Adafactor

from adapters.weights.kinds import KINDS, adapter_parameters, adapter_state
from finetune.data.batches import Batches
from finetune.data.pictures import to_tensor
from finetune.recipe.schema import Recipe
from finetune.run.trainee import Trainee
from finetune.run.validation import DrawnRow, Validator
from finetune.step.inputs import Batch
from finetune.step.optimizers import OPTIMIZERS
from tests.builders.random_cascade import TEXT_WIDTH, RandomCascade
from tests.builders.small_runs import (
    PROMPTS,
    exported,
    flat,
    logged,
    made_batches,
    material_of,
    recipe_of,
    saved_weights,
    train,
    trainee_of,
)
from unets.frozen import Quantised

RATE = 1e-3
Recipes = Callable[..., Recipe]


@pytest.fixture
def make(random_cascade: RandomCascade, tmp_path: Path) -> Recipes:
    """Recipes, each with runs of its own and all with one cache."""
    made: list[Recipe] = []

    def recipe(**settings: Any) -> Recipe:
        name = f"run-{len(made)}"
        made.append(recipe_of(random_cascade, tmp_path, **{"name": name, **settings}))
        return made[-1]

    return recipe


def gradient(trainee: Trainee, *batches: Batch) -> Tensor:
    """The gradient of some batches, added to a trainee's, which was zero."""
    for batch in batches:
        trainee.accumulate(batch)
    return trainee.weights.gradient.clone()


def relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.norm() / to.norm())


# The learning rate: Adam without memory moves a weight by it, whatever the gradient.


def rates(recipe: Recipe) -> list[float]:
    """The largest move of a weight at each step."""
    weights = saved_weights(recipe)
    return (weights[1:] - weights[:-1]).abs().amax(1).tolist()


def rises(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


SHAPES: dict[str, tuple[dict[str, Any], Callable[[list[float]], bool]]] = {
    "constant": ({}, lambda x: min(x) == pytest.approx(RATE, rel=1e-3)),
    "half the rate": (
        {"learning_rate": RATE / 2},
        lambda x: x == pytest.approx([RATE / 2] * 6, rel=1e-3),
    ),
    "warm-up": (
        {"warmup_steps": 3},
        lambda x: rises(x[:4]) and x[4:] == pytest.approx([RATE] * 2, rel=1e-3),
    ),
    "linear": ({"schedule": "linear"}, lambda x: rises(x[::-1]) and x[-1] < 0.5 * RATE),
    "cosine": ({"schedule": "cosine"}, lambda x: rises(x[::-1]) and x[-1] < 0.5 * RATE),
    "one-cycle": (
        {"schedule": "one_cycle"},
        lambda x: x[0] < 0.2 * RATE and x[-1] < 0.3 * RATE and max(x) > 0.7 * RATE,
    ),
}
"""Settings, and what they make of the rates of six steps."""


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_move_as_far_as_the_schedule_says(make: Recipes, shape: str) -> None:
    settings, holds = SHAPES[shape]
    recipe = make(optimizer=settings, stage={"steps": 6})
    train(recipe)
    moved = rates(recipe)
    assert holds(moved), moved
    rounding = 1e-8  # of weights that have moved by as little as a ten-millionth
    assert logged(recipe, "optimizer/learning_rate") == pytest.approx(moved, rel=1e-3, abs=rounding)


def test_lora_plus_moves_b_matrices_farther(make: Recipes) -> None:
    recipe = make(optimizer={"lora_plus_ratio": 8.0}, stage={"steps": 2})
    last = train(recipe)
    before, after = saved_weights(recipe)[1:]
    is_b = flat({name: torch.full(t.shape, float("lora_B" in name)) for name, t in last.items()})
    moved = (after - before).abs()
    assert moved[is_b == 1].max().item() == pytest.approx(8 * RATE, rel=1e-3)
    assert moved[is_b == 0].max().item() == pytest.approx(RATE, rel=1e-3)


@pytest.mark.parametrize(("betas", "alike"), [([0, 0], True), (None, False), ([0.5, 0.9], False)])
def test_betas_give_the_optimizer_its_memory(make: Recipes, betas: Any, alike: bool) -> None:
    recipe = make(optimizer={"betas": betas}, stage={"steps": 3})
    train(recipe)
    moved = (saved_weights(recipe)[3] - saved_weights(recipe)[2]).abs()
    share = ((moved - RATE).abs() < 0.01 * RATE).double().mean().item()
    assert (share > 0.5) == alike


@pytest.mark.parametrize("optimizer", [n for n in OPTIMIZERS if not n.startswith("paged")])
def test_weight_decay_shrinks_weights_in_proportion(make: Recipes, optimizer: str) -> None:
    """Decoupled: beside the same step without it, a weight loses rate x decay of itself."""
    finds_scale = OPTIMIZERS[optimizer].finds_scale
    rate, decay = (1.0, 2.0) if finds_scale else (RATE, 0.5)
    ends = []
    for each in (0.0, decay):
        options = {"name": optimizer, "learning_rate": rate, "betas": None, "weight_decay": each}
        trainee = trainee_of(make(optimizer=options))
        start = flat(adapter_state(trainee.unet))
        trainee.accumulate(made_batches(make())(0))
        trainee.update()
        ends.append(flat(adapter_state(trainee.unet)))
    lost = ends[0] - ends[1]
    share = float(lost @ start / (start @ start))
    assert relative(lost - share * start, lost) < 0.2
    assert share > 0
    if not finds_scale:
        assert share == pytest.approx(rate * decay, rel=0.02)


PUBLISHED: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "adamw": (torch.optim.AdamW, 1e-5),
    "adamw_8bit": (torch.optim.AdamW, 0.02),
    "adafactor": (partial(Adafactor, scale_parameter=False, relative_step=False), 1e-5),
    "prodigy": (partial(Prodigy, safeguard_warmup=True), 1e-4),
    "schedule_free": (AdamWScheduleFree, 1e-5),
}
"""The optimizers as their libraries publish them, and how closely ours agree."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_updates_are_those_of_the_published_optimizer_on_each_tensor(
    make: Recipes, name: str
) -> None:
    build, tolerance = PUBLISHED[name]
    rate = 0.5 if OPTIMIZERS[name].finds_scale else RATE
    options = {"name": name, "learning_rate": rate, "betas": None, "weight_decay": 0.1}
    trainee = trainee_of(make(optimizer=options | {"max_grad_norm": None}))
    parameters = adapter_parameters(trainee.unet)
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    published = build(list(theirs.values()), lr=rate, weight_decay=0.1)
    if isinstance(published, AdamWScheduleFree):
        published.train()
    made, before = made_batches(make()), flat(adapter_state(trainee.unet))
    for index in range(4):
        trainee.accumulate(made(index))
        for each, parameter in theirs.items():
            assert parameters[each].grad is not None
            parameter.grad = parameters[each].grad.clone()
        trainee.update()
        published.step()
    expected = flat({name: p.detach() for name, p in theirs.items()})
    ours = flat(adapter_state(trainee.unet))
    assert relative(ours - expected, expected - before) < tolerance


def test_a_gradient_below_the_clip_stays_as_it_is(make: Recipes) -> None:
    batch = made_batches(make())(0)
    for limit, scale in ((None, 1.0), (1e6, 1.0), (0.5, 0.5)):
        trainee = trainee_of(make(optimizer={"max_grad_norm": limit}))
        seen: list[Tensor] = []
        flat_gradient = trainee.weights.gradient
        trainee.optimizer.register_step_pre_hook(
            lambda *_, seen=seen, g=flat_gradient: seen.append(g.clone())
        )
        own = gradient(trainee, batch)
        own *= 2 / own.norm()  # a norm of 2
        flat_gradient.copy_(own)
        norm = trainee.update()
        assert norm.item() == pytest.approx(2, rel=1e-4)
        expected = own if scale == 1 else own * scale / 2
        torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=0)


# What is kept of the weights

PICTURES = {
    "sampling": {"stage_1": {"steps": 2}},
    "through_stage_2": "never",
    "loss_pictures": 0,
}
"""A validation of pictures alone."""


def ages(recipe: Recipe) -> float:
    """The average age in steps of the exported weights, as a mean of those of each step."""
    weights, average = saved_weights(recipe), flat(exported(recipe))
    shares = torch.linalg.lstsq(weights.T, average[:, None]).solution[:, 0]
    assert relative(weights.T @ shares - average, average) < 1e-5
    assert shares.min() > -1e-3
    assert shares.sum().item() == pytest.approx(1, abs=1e-3)
    return float(shares @ torch.arange(len(weights) - 1, -1, -1, dtype=torch.float64))


def test_the_average_of_the_weights_is_exported_and_older_the_slower_it_decays(
    make: Recipes,
) -> None:
    found = []
    for decay in (None, 0.0, 0.1, 0.9):
        recipe = make(stage={"ema_decay": decay}, optimizer={"learning_rate": 0.03})
        train(recipe)
        found.append(ages(recipe))
    assert found[:2] == pytest.approx([0, 0], abs=1e-3)
    assert 0.05 < found[2] < 0.3
    assert found[3] > found[2] + 0.1


def test_schedule_free_weights_are_exported_averaged(make: Recipes) -> None:
    """Its memory of the first moment is an average's share, which training is not at."""
    options = {"name": "schedule_free", "learning_rate": 0.03, "betas": None}
    recipe = make(optimizer=options)
    last = flat(train(recipe))
    training = saved_weights(recipe)
    assert relative(last - training[-1], training[-1] - training[0]) > 0.02
    assert relative(last - training[-1], last - training[0]) < 1


@pytest.mark.parametrize("name", ["schedule_free", "adamw_8bit"])
def test_pictures_on_the_way_change_nothing(
    make: Recipes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Validator, "sample", lambda self: {})
    ends = []
    for prompts in ((), [PROMPTS[3]]):
        recipe = make(
            stage={"ema_decay": 0.5},
            optimizer={"name": name, "learning_rate": 0.03, "betas": None},
            validation=PICTURES | {"prompts": prompts, "every": 1},
        )
        train(recipe)
        ends.append(saved_weights(recipe))
    assert torch.equal(*ends)


def test_pictures_on_the_way_are_those_of_the_average(
    make: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[int, Tensor] = {}

    def look(self: Validator) -> list[DrawnRow]:
        unet = self.cascade.stages[1].unet
        shown[len(shown)] = flat(adapter_state(unet))
        assert not unet.training
        return sample(self)

    sample = Validator.sample

    monkeypatch.setattr(Validator, "sample", look)
    for steps in (2, 5):
        shown.clear()
        recipe = make(
            stage={"ema_decay": 0.5, "steps": steps},
            optimizer={"learning_rate": 0.03},
            validation=PICTURES | {"prompts": [PROMPTS[3]], "every": 2},
        )
        average = flat(train(recipe))
        assert (
            len(shown) == {2: 2, 5: 4}[steps]
        )  # at first, after every second step, and at the end
        torch.testing.assert_close(shown[len(shown) - 1], average, rtol=0, atol=1e-7)
        if steps == 2:
            after_two = average
    torch.testing.assert_close(shown[1], after_two, rtol=0, atol=1e-7)


# The loss


@pytest.mark.parametrize("number", [1, 2])
def test_min_snr_weighs_the_loss_that_trains(make: Recipes, number: int) -> None:
    gamma = 0.5
    plain, weighted = (
        trainee_of(make(stages=(number,), stage={"min_snr_gamma": each}), number)
        for each in (None, gamma)
    )
    batch = made_batches(make(stages=(number,)), number)(0)
    batch = replace(batch, timesteps=torch.tensor([100, 800]))
    base, ours = (trainee.accumulate(batch) for trainee in (plain, weighted))
    scheduler = DDPMScheduler.from_pretrained(
        make(stages=(number,)).source(plain.stage).name, subfolder="scheduler"
    )
    bars = scheduler.alphas_cumprod.double()[batch.timesteps]
    snr = bars / (1 - bars)
    assert (snr > gamma).tolist() == [True, False]
    expected = base.mse.double() * snr.clamp(max=gamma) / snr + base.bound.double()
    torch.testing.assert_close(ours.total.double(), expected, rtol=1e-4, atol=0)
    assert (
        relative(weighted.weights.gradient - plain.weights.gradient, plain.weights.gradient) > 0.1
    )


def test_the_gradient_is_that_of_each_pictures_loss_times_its_weight(make: Recipes) -> None:
    batch = made_batches(make())(0)
    one, other, both = (
        gradient(trainee_of(make()), replace(batch, weight=torch.tensor(weight)))
        for weight in ([1.0, 0.0], [0.0, 1.0], [0.25, 3.0])
    )
    torch.testing.assert_close(both, 0.25 * one + 3 * other, rtol=1e-3, atol=1e-6)
    assert relative(one - other, one) > 0.1


def test_the_prior_is_part_of_a_run(make: Recipes) -> None:
    prior = {"prompts": ["a dog"], "share": 0.25, "weight": 3.0}
    with_prior = make(prior=prior, stage={"batch_size": 4})
    batch = made_batches(with_prior)(0)
    assert batch.weight.tolist() == pytest.approx([1 / 3] * 3 + [3.0])
    without = made_batches(make(stage={"batch_size": 4}))(0)
    assert without.weight.tolist() == pytest.approx([1 / 4] * 4)


# What is drawn for a batch


def several(batches: Batches, count: int) -> dict[str, Tensor]:
    """The tensors of the first batches, joined."""
    made = [batches(index).tensors() for index in range(count)]
    return {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}


def test_noise_levels_are_the_recipes(make: Recipes) -> None:
    for levels, low, high in (([100, 103], 100, 103), (None, 0, 999), ([7, 7], 7, 7)):
        recipe = make(stages=(2,), stage={"noise_level": levels, "batch_size": 20})
        drawn = several(made_batches(recipe, 2), 4)["noise_level"]
        assert low <= drawn.min() < low + 60
        assert high - 60 < drawn.max() <= high
        assert len(drawn.unique()) >= min(high - low + 1, 40)


@pytest.mark.parametrize("number", [1, 2])
def test_another_seed_is_another_run(make: Recipes, number: int) -> None:
    first, again, other = (make(seed=seed, stages=(number,)) for seed in (3, 3, 4))
    drawn = [several(made_batches(recipe, number), 3) for recipe in (first, again, other)]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    differing = {name for name in drawn[0] if not torch.equal(drawn[0][name], drawn[2][name])}
    assert differing >= {"pixels", "noise", "timesteps"} | (
        {"noise_level"} if number == 2 else set()
    )
    fresh = [flat(adapter_state(trainee_of(each, number).unet)) for each in (first, again, other)]
    assert torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh[0], fresh[2])


def test_both_stages_draw_apart(make: Recipes) -> None:
    recipe = make(stages=(1, 2))
    one, two = (several(made_batches(recipe, number), 2)["timesteps"] for number in (1, 2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("shift", "flip"), [(0.0, False), (0.0, True), (0.1, False)])
def test_crops_shift_and_flip_as_the_recipe_says(make: Recipes, shift: float, flip: bool) -> None:
    data = {"source": "unread", "center_shift": shift, "horizontal_flip": flip}
    recipe = make(data=data, stage={"batch_size": 12})
    drawn = several(made_batches(recipe), 5)["pixels"].unique(dim=0)
    squares = [
        Image.fromarray(picture.pixels).crop((8, 0, 88, 80)).resize((16, 16), Image.BICUBIC)
        for picture in material_of(recipe).pictures
    ]
    squares += [ImageOps.mirror(square) for square in squares] if flip else []
    centred = torch.stack([to_tensor(square) for square in squares]).unique(dim=0)
    if shift == 0:
        assert torch.equal(drawn, centred)
    else:
        assert len(drawn) > 2 * len(centred)


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (1.0, 1, 1), (0.4, 0.25, 0.55)])
def test_captions_are_dropped_as_often_as_the_recipe_says(
    make: Recipes, dropout: float, low: float, high: float
) -> None:
    recipe = make(data={"source": "unread", "caption_dropout": dropout}, stage={"batch_size": 40})
    drawn = several(made_batches(recipe), 3)["prompt_embeds"]
    empty = material_of(recipe).prompt_embeds[""]
    share = (drawn == empty).all(dim=(1, 2)).double().mean().item()
    assert low <= share <= high


def test_accumulated_batches_follow_one_another(
    make: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    call = Batches.__call__

    def count(self: Batches, index: int) -> Batch:
        made.append(index)
        return call(self, index)

    monkeypatch.setattr(Batches, "__call__", count)
    recipe = make(stage={"steps": 2, "accumulation": 3, "batch_size": 5})
    train(recipe)
    assert sorted(made) == list(range(6))
    assert {len(call(made_batches(recipe), 0).pixels)} == {5}


# The model


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_the_base_is_in_the_recipes_precision(make: Recipes, precision: str) -> None:
    unet = trainee_of(make(stage={"precision": precision})).unet
    formats = {module.format for module in unet.modules() if isinstance(module, Quantised)}
    assert formats == ({precision} if precision in ("int8", "nf4") else set())
    own = {"bf16": torch.bfloat16}.get(precision, torch.float32)
    assert unet.conv_in.weight.dtype == own


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_checkpointed_blocks_are_run_once_more(
    make: Recipes, checkpointing: bool, passes: int
) -> None:
    recipe = make(stage={"gradient_checkpointing": checkpointing})
    trainee, runs = trainee_of(recipe), []
    behind_adapters = trainee.unet.up_blocks[0].resnets[0]
    behind_adapters.register_forward_pre_hook(lambda *_: runs.append(1))
    trainee.accumulate(made_batches(recipe)(0))
    assert len(runs) == passes


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recomputed_drops_what_was_dropped(make: Recipes, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        # diffusers recomputes ResNet blocks, not attention
        adapter = {"kind": kind, "rank": 4, "dropout": 0.5, "targets": "all"}
        stage = {"adapter": adapter, "gradient_checkpointing": checkpointing}
        trainee = trainee_of(make(stage=stage))
        for index, tensor in enumerate(adapter_state(trainee.unet).values()):
            torch.manual_seed(index)
            tensor.add_(torch.randn(tensor.shape) * 0.05)
        torch.manual_seed(0)
        gradients.append(gradient(trainee, made_batches(make())(0)))
    assert relative(gradients[1] - gradients[0], gradients[0]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_in_training_alone(make: Recipes, kind: str) -> None:
    adapter = {"kind": kind, "rank": 4, "dropout": 0.5}
    losses, plain = [], []
    for recipe, found in (
        (make(stage={"adapter": adapter}), losses),
        (make(stage={"adapter": adapter | {"dropout": 0.0}}), plain),
    ):
        trainee = trainee_of(recipe)
        trainee.weights.values.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        trainee.weights.publish()
        batch = made_batches(recipe)(0)
        for key in (1, 2):
            keys = torch.full_like(batch.dropout_keys, key)
            found.append(trainee.accumulate(replace(batch, dropout_keys=keys)).total)
        with trainee.final_weights() as unet, torch.no_grad():
            x = torch.ones(1, 3, *[unet.config.sample_size] * 2)
            found.append(unet(x, 500, torch.ones(1, 7, TEXT_WIDTH)).sample)
    assert not torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], plain[0])
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(losses[2], plain[2])


def test_each_step_drops_something_else_and_each_run_the_same(
    make: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step the same batch and, but for rounding, the same weights."""
    call = Batches.__call__

    def same_but_for_dropout(self: Batches, index: int) -> Batch:
        return replace(call(self, 0), dropout_keys=call(self, index).dropout_keys)

    monkeypatch.setattr(Batches, "__call__", same_but_for_dropout)

    def norms(dropout: float) -> list[float]:
        adapter = {"rank": 4, "dropout": dropout}
        recipe = make(stage={"adapter": adapter}, optimizer={"learning_rate": 1e-20})
        train(recipe)
        return logged(recipe, "optimizer/gradient_norm")

    assert norms(0.0) == pytest.approx([norms(0.0)[0]] * 4, rel=1e-6)
    dropped = norms(0.5)
    assert len(set(dropped)) == 4
    assert norms(0.5) == dropped
