"""A run in which a tensor does not learn stops; what is not finite is never exported."""

from pathlib import Path

import pytest
import torch

from adapters.errors import UserError
from adapters.files.export import AdapterInfo, export_adapter
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.measure import group_by_block
from adapters.weights.kinds import KINDS, AdapterSpec
from finetune.run.trainee import Trainee
from finetune.run.update_size import UpdateSize
from finetune.step.gradients import GradientWatch
from tests.builders.random_cascade import RandomCascade
from tests.builders.trainees import take_steps, trainee_of

CONVOLUTION = "down_blocks.0.resnets.0.conv1"


def info(trainee: Trainee) -> AdapterInfo:
    return AdapterInfo(
        base_model="base", stage=1, spec=trainee.training.adapter, step=1, recipe="", version="0"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_every_kind_has_a_gradient_by_its_second_chance(
    random_cascade: RandomCascade, kind: str
) -> None:
    spec = AdapterSpec(kind=kind, targets="all")
    trainee = trainee_of(random_cascade.stage_1, 1, adapter=spec)
    take_steps(trainee, 2)
    assert not trainee.watch.complete
    take_steps(trainee, 1)
    assert trainee.watch.received.all()
    trainee.watch.check()
    assert trainee.watch.complete


@pytest.mark.parametrize("broken", [f"{CONVOLUTION}.lora_A.default", "mid_block"])
def test_tensors_without_gradient_are_named(random_cascade: RandomCascade, broken: str) -> None:
    spec = AdapterSpec(targets=("mid_block.*.to_q", CONVOLUTION))
    trainee = trainee_of(random_cascade.stage_1, 1, adapter=spec)
    dead = [name for name in trainee.weights.parameters if name.startswith(broken)]
    alive = [name for name in trainee.weights.parameters if not name.startswith(broken)]
    for name in dead:
        trainee.weights.parameters[name].register_hook(torch.zeros_like)
    for _ in range(2):
        take_steps(trainee, 1)
        trainee.watch.check()  # the second chance is the third step's
    take_steps(trainee, 1)
    with pytest.raises(UserError, match=f"{len(dead)} of {len(dead + alive)} trainable") as error:
        trainee.watch.check()
    assert all(name in str(error.value) for name in dead)
    assert not any(name in str(error.value) for name in alive)


def test_a_gradient_that_is_not_finite_is_none(random_cascade: RandomCascade) -> None:
    trainee = trainee_of(random_cascade.stage_1, 1)
    name = next(iter(trainee.weights.parameters))
    trainee.weights.gradient.fill_(1.0)
    trainee.weights.views(trainee.weights.gradient)[name].view(-1)[3] = float("nan")
    trainee.watch.observe(trainee.weights.gradient, 1.0)
    received = dict(zip(trainee.watch.names, trainee.watch.received.tolist(), strict=True))
    assert [each for each, got in received.items() if not got] == [name]


def test_chances_count_from_the_first_update_that_moves(random_cascade: RandomCascade) -> None:
    watch = trainee_of(random_cascade.stage_1, 1).watch
    gradient = torch.zeros(256 * sum(1 for _ in watch._owners))
    for rate in (0.0, 0.0, 1e-4, 1e-4):
        watch.observe(gradient, rate)
    assert watch.chances == 1
    watch.check()
    watch.observe(gradient, 1e-4)
    with pytest.raises(UserError, match="no finite gradient in 2 steps"):
        watch.check()


@pytest.mark.parametrize(("dropout", "needed"), [(0.0, 2), (0.1, 9), (0.5, 30), (0.9, 197)])
def test_dropout_is_given_more_chances(
    random_cascade: RandomCascade, dropout: float, needed: int
) -> None:
    trainee = trainee_of(random_cascade.stage_1, 1)
    assert GradientWatch(trainee.weights, dropout).needed == needed


def test_what_is_known_of_gradients_is_kept_in_a_checkpoint(random_cascade: RandomCascade) -> None:
    trainee = trainee_of(random_cascade.stage_1, 1)
    take_steps(trainee, 2)
    other = trainee_of(random_cascade.stage_1, 1)
    other.load_state(trainee.state())
    assert torch.equal(other.watch.received, trainee.watch.received)
    assert (other.watch.chances, other.watch.moved) == (1, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_exported(
    random_cascade: RandomCascade, value: float, tmp_path: Path
) -> None:
    trainee = trainee_of(random_cascade.stage_1, 1)
    export_adapter(trainee.unet, tmp_path, info(trainee))
    before = (tmp_path / "stage_1" / "adapter_model.safetensors").read_bytes()
    name = next(iter(trainee.weights.parameters))
    trainee.weights.parameters[name].data.view(-1)[0] = value
    with pytest.raises(UserError, match=r"1 of the adapter's .* NaN or infinite") as error:
        export_adapter(trainee.unet, tmp_path, info(trainee))
    assert name.replace(".default", "") in str(error.value)
    assert (tmp_path / "stage_1" / "adapter_model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".export*"))


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_an_update_is_that_of_what_merging_adds(
    random_cascade: RandomCascade, kind: str, precision: str, tmp_path: Path
) -> None:
    spec = AdapterSpec(kind=kind, rank=2, alpha=3.0, targets="all")
    trainee = trainee_of(random_cascade.stage_1, 1, precision, adapter=spec)  # type: ignore[arg-type]
    size = UpdateSize(trainee.unet)
    assert max(size().values()) == pytest.approx(0.0, abs=1e-5)
    take_steps(trainee, 2)
    export_adapter(trainee.unet, tmp_path, info(trainee))
    adapter = StageAdapter.load(tmp_path / "stage_1")
    found = size()
    assert found.keys() == group_by_block(adapter.modules).keys()
    for block, names in group_by_block(adapter.modules).items():
        added = weights = 0.0
        for name in names:
            layer = trainee.unet.get_submodule(name).get_base_layer()
            weight = layer.weight.detach().contiguous()
            added += float(adapter.delta(name, weight).double().square().sum())
            weights += float(weight.double().square().sum())
        assert found[block] == pytest.approx((added / weights) ** 0.5, rel=1e-3), block
