"""One step and its state: only the adapter trains; a saved state continues to the same bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from adapters.weights.kinds import KINDS, AdapterSpec
from finetune.recipe.schema import Optimizer
from finetune.run.checkpoints import load_checkpoint, save_checkpoint
from finetune.run.trainee import Trainee
from finetune.step.inputs import Batch
from finetune.step.optimizers import OPTIMIZERS
from tests.builders.random_cascade import RandomCascade
from tests.builders.trainees import batch_of, take_steps, trainee_of
from unets.precision import Precision


def trainee_at(
    cascade: RandomCascade, stage: int, precision: Precision = "fp32", **options: object
) -> Trainee:
    base = {1: cascade.stage_1, 2: cascade.stage_2}[stage]
    return trainee_of(base, stage, precision, **options)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_the_base_does_not_change(
    random_cascade: RandomCascade, stage: int, kind: str
) -> None:
    trainee = trainee_at(random_cascade, stage, adapter=AdapterSpec(kind=kind))
    names = set(trainee.weights.parameters)
    base = {n: t.clone() for n, t in trainee.unet.state_dict().items() if n not in names}
    batch = batch_of(trainee)
    losses = []
    for _ in range(5):
        losses.append(trainee.accumulate(batch).total.mean().item())
        trainee.update()
    assert losses[-1] < losses[0]
    trainable = {name for name, p in trainee.unet.named_parameters() if p.requires_grad}
    assert trainable == names
    for name, tensor in base.items():
        assert torch.equal(trainee.unet.state_dict()[name], tensor), name


@pytest.mark.parametrize("optimizer", [n for n in OPTIMIZERS if not n.startswith("paged")])
def test_a_saved_state_continues_to_the_same_bytes(
    random_cascade: RandomCascade, optimizer: str, tmp_path: Path
) -> None:
    rate = 1.0 if OPTIMIZERS[optimizer].finds_scale else 1e-2
    options = {
        "optimizer": Optimizer(name=optimizer, learning_rate=rate),
        "adapter": AdapterSpec(rank=16, targets="all"),
        "ema_decay": 0.5,
    }
    straight = trainee_at(random_cascade, 1, **options)
    take_steps(straight, 2)
    folder = save_checkpoint(tmp_path, 2, straight.state(), keep=1)
    take_steps(straight, 2)
    continued = trainee_at(random_cascade, 1, **options)
    continued.load_state(load_checkpoint(folder))
    assert continued.step == 2
    take_steps(continued, 2)
    for name, parameter in straight.weights.parameters.items():
        assert torch.equal(parameter, continued.weights.parameters[name]), name
    assert straight.average is not None
    assert continued.average is not None
    assert torch.equal(straight.average, continued.average)


def give_values(trainee: Trainee) -> None:
    """Weights that are not those of a fresh adapter, which changes nothing."""
    trainee.weights.values.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    trainee.weights.publish()


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_one_large_batch(random_cascade: RandomCascade, kind: str) -> None:
    """With dropout too: a picture's mask is its own, and a weight's that of the step."""

    def gradient(accumulation: int, parts: list[Batch], dropout: float = 0.3) -> torch.Tensor:
        spec = AdapterSpec(kind=kind, rank=8, dropout=dropout)
        trainee = trainee_at(random_cascade, 1, accumulation=accumulation, adapter=spec)
        give_values(trainee)
        for part in parts:
            trainee.accumulate(part)
        return trainee.weights.gradient.clone()

    trainee = trainee_at(random_cascade, 1)
    parts = [batch_of(trainee, index) for index in (0, 1)]
    names = parts[0].tensors()
    together = Batch(
        **{n: torch.cat([part.tensors()[n] for part in parts]) for n in names if n != "weight"},
        weight=torch.full((4,), 0.25),
    )
    large = gradient(1, [together])
    scale = float(large.abs().max())
    assert torch.allclose(gradient(2, parts), large, rtol=1e-3, atol=1e-5 * scale)
    assert not torch.allclose(gradient(1, [together], 0.0), large, rtol=1e-2, atol=1e-2 * scale)


def test_the_gradient_is_clipped_to_its_norm(random_cascade: RandomCascade) -> None:
    trainee = trainee_at(
        random_cascade,
        1,
        optimizer=Optimizer(name="adamw", learning_rate=1e-30, max_grad_norm=1e-3),
    )
    seen: list[torch.Tensor] = []
    gradient = trainee.weights.gradient
    trainee.optimizer.register_step_pre_hook(lambda *_: seen.append(gradient.clone()))
    trainee.accumulate(batch_of(trainee))
    norm = trainee.update()
    assert norm > 1e-3
    assert seen[0].norm().item() == pytest.approx(1e-3, rel=1e-4)
    assert trainee.weights.gradient.abs().max() == 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(
    random_cascade: RandomCascade, kind: str, dropout: float
) -> None:
    spec = AdapterSpec(kind=kind, rank=8, dropout=dropout)
    plain = trainee_at(random_cascade, 2, adapter=spec)
    checkpointed = trainee_at(random_cascade, 2, adapter=spec, gradient_checkpointing=True)
    for trainee in (plain, checkpointed):
        give_values(trainee)
        trainee.accumulate(replace(batch_of(trainee, pictures=3), preserved=torch.tensor([2])))
    gradients = [trainee.weights.gradient for trainee in (plain, checkpointed)]
    scale = float(gradients[0].abs().max())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_base_trains_a_float32_adapter(random_cascade: RandomCascade, kind: str) -> None:
    spec = AdapterSpec(kind=kind)
    trainee = trainee_at(random_cascade, 1, precision="bf16", adapter=spec)
    assert trainee.unet.dtype == torch.bfloat16
    assert trainee.weights.values.dtype == trainee.weights.gradient.dtype == torch.float32
    take_steps(trainee, 1)
    assert torch.isfinite(trainee.weights.values).all()
    working = trainee.weights.views(trainee.weights.working)
    for name, exact in trainee.weights.views(trainee.weights.values).items():
        assert torch.equal(trainee.weights.parameters[name], working[name])
        assert torch.equal(exact.to(working[name].dtype), working[name])
    with trainee.final_weights():
        assert {p.dtype for p in trainee.weights.parameters.values()} == {torch.float32}


def test_gradients_in_bf16_are_those_in_float32_but_for_rounding(
    random_cascade: RandomCascade,
) -> None:
    gradients = []
    for precision in ("fp32", "bf16"):
        trainee = trainee_at(random_cascade, 1, precision)
        trainee.accumulate(batch_of(trainee))
        gradients.append(trainee.weights.gradient.clone())
    exact, rounded = gradients
    assert (rounded - exact).norm() / exact.norm() < 0.1


def test_the_average_warms_up_as_in_its_formula(random_cascade: RandomCascade) -> None:
    for decay in (0.25, 0.9999):
        trainee = trainee_at(random_cascade, 1, ema_decay=decay)
        expected = trainee.weights.values.double()
        theirs: EMAModel | None = None
        for updates in range(6):
            take_steps(trainee, 1)
            rate = min(decay, (1 + updates) / (10 + updates))
            expected = rate * expected + (1 - rate) * trainee.weights.values.double()
            assert trainee.average is not None
            assert torch.allclose(trainee.average.double(), expected, rtol=1e-5, atol=1e-8)
            if theirs is None:  # diffusers' first update takes the weights as they are
                theirs = EMAModel([nn.Parameter(trainee.average.clone())], decay=decay)
                theirs.optimization_step = 1
            else:
                theirs.step([nn.Parameter(trainee.weights.values)])
            assert torch.allclose(trainee.average, theirs.shadow_params[0], rtol=1e-5, atol=1e-8)


def test_final_weights_are_the_average_and_training_goes_on_unchanged(
    random_cascade: RandomCascade,
) -> None:
    trainee = trainee_at(random_cascade, 1, ema_decay=0.5)
    take_steps(trainee, 3)
    training = {name: p.detach().clone() for name, p in trainee.weights.parameters.items()}
    assert trainee.average is not None
    with trainee.final_weights() as unet:
        assert not unet.training
        for name, average in trainee.weights.views(trainee.average).items():
            assert torch.equal(trainee.weights.parameters[name], average)
    assert trainee.unet.training
    for name, tensor in training.items():
        assert torch.equal(trainee.weights.parameters[name], tensor)
