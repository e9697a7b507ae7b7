"""Every optimizer learns, every schedule has its shape."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import get_scheduler

from finetune.run.checkpoints import load_checkpoint, save_checkpoint
from finetune.step.flat_weights import FlatWeights
from finetune.step.optimizers import (
    OPTIMIZERS,
    averaged_weights,
    build_optimizer,
    set_learning_rate,
)
from finetune.step.schedules import SCHEDULES

ON_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]
RATES = {"prodigy": 1.0, "lion_8bit": 3e-3}


def parameters() -> dict[str, nn.Parameter]:
    """Two matrices of an adapter, large enough for 8-bit states."""
    draw = torch.Generator().manual_seed(0)
    return {
        "x.lora_A.default.weight": nn.Parameter(torch.randn(64, 64, generator=draw)),
        "x.lora_B.default.weight": nn.Parameter(torch.randn(64, 64, generator=draw)),
    }


def build(name: str, values: dict[str, nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    weights = FlatWeights(values, torch.float32)
    return build_optimizer(
        name,
        weights.slices(whole_tensors=OPTIMIZERS[name].whole_tensors),
        learning_rate=RATES.get(name, 1e-2),
        weight_decay=0.0,
        **options,
    )


@pytest.mark.parametrize("name", ON_CPU)
def test_every_optimizer_descends_and_continues_from_its_state(name: str, tmp_path: Path) -> None:
    def loss() -> torch.Tensor:
        return torch.stack([p.square().mean() for p in values.values()]).sum()

    def steps(count: int) -> None:
        for _ in range(count):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    values = parameters()
    optimizer = build(name, values)
    first = loss().item()
    steps(40)
    assert loss().item() < 0.9 * first
    saved = {key: p.detach().clone() for key, p in values.items()}
    folder = save_checkpoint(tmp_path, 1, optimizer.state_dict(), keep=1)
    steps(3)
    continued = {key: p.detach().clone() for key, p in values.items()}

    values = {key: nn.Parameter(tensor) for key, tensor in saved.items()}
    optimizer = build(name, values)
    optimizer.load_state_dict(load_checkpoint(folder))
    steps(3)
    for key, tensor in continued.items():
        assert torch.equal(values[key], tensor)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("size", [256, 16])
def test_the_state_takes_what_its_row_says(name: str, size: int) -> None:
    weights = FlatWeights({"slow": nn.Parameter(torch.randn(size, size))}, torch.float32)
    slices = weights.slices(whole_tensors=OPTIMIZERS[name].whole_tensors)
    optimizer = build_optimizer(name, slices, learning_rate=1.0, weight_decay=0.0)
    weights.gradient.fill_(1.0)
    optimizer.step()
    tensors = {
        tensor.data_ptr(): tensor
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not key.startswith("qmap")  # 256 levels, shared
    }
    taken = sum(tensor.nbytes for tensor in tensors.values())
    few = 0.05 * size * size  # a step count; Adafactor's rows and columns
    assert OPTIMIZERS[name].state_bytes(slices) == pytest.approx(taken, abs=max(few, 300))


@pytest.mark.parametrize("name", [n for n in ON_CPU if OPTIMIZERS[n].betas is not None])
def test_betas_are_the_optimizers_own_unless_given(name: str) -> None:
    def betas(**options: Any) -> tuple[float, float]:
        return tuple(build(name, parameters(), **options).param_groups[0]["betas"])

    assert betas() == ((0.9, 0.99) if name.startswith("lion") else (0.9, 0.999))
    assert betas(betas=(0.5, 0.6)) == (0.5, 0.6)


@pytest.mark.parametrize(
    ("name", "theirs"), [("adamw_8bit", bnb.optim.AdamW8bit), ("lion_8bit", bnb.optim.Lion8bit)]
)
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_8_bit_states_are_those_that_bitsandbytes_keeps_for_each_tensor(
    name: str, theirs: type[torch.optim.Optimizer], ratio: float
) -> None:
    """Tensors of very unlike gradients, none as long as a whole number of blocks, bit for bit."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"x.lora_A": (67, 71), "y.lora_A": (3, 33), "x.lora_B": (71, 67), "y.lora_B": (5, 5)}
    starts = {
        f"{key}.default.weight": torch.randn(shape, generator=draw) for key, shape in shapes.items()
    }
    values = {key: nn.Parameter(start.clone()) for key, start in starts.items()}
    weights = FlatWeights(values, torch.float32)
    slices = weights.slices(whole_tensors=False)
    ours = build_optimizer(
        name, slices, learning_rate=1e-2, weight_decay=0.1, lora_plus_ratio=ratio
    )
    alone = {key: nn.Parameter(start.clone()) for key, start in starts.items()}
    groups = [
        {"params": [p], "lr": 1e-2 * (ratio if ".lora_B." in key else 1.0)}
        for key, p in alone.items()
    ]
    betas = OPTIMIZERS[name].betas
    reference = theirs(groups, betas=betas, weight_decay=0.1)  # type: ignore[call-arg]
    for step in range(5):
        for size, (key, p) in enumerate(alone.items()):
            p.grad = torch.randn(p.shape, generator=draw) * 10.0 ** (-2 * size)
            weights.views(weights.gradient)[key].copy_(p.grad)
        ours.step()
        reference.step()
        for key, p in alone.items():
            assert torch.equal(p, values[key]), (step, key)
    bits = {state["state1"].dtype for state in ours.state.values()}
    assert bits == {torch.uint8, torch.float32}


def test_lora_plus_gives_b_matrices_their_own_rate() -> None:
    values = parameters()
    before = {key: p.detach().clone() for key, p in values.items()}
    weights = FlatWeights(values, torch.float32)
    optimizer = build_optimizer(
        "adamw",
        weights.slices(whole_tensors=False),
        learning_rate=1e-2,
        weight_decay=0.0,
        lora_plus_ratio=16.0,
    )
    set_learning_rate(optimizer, 0.5)
    weights.gradient.fill_(1.0)
    optimizer.step()  # Adam's first step is the rate itself
    steps = {key: (before[key] - p).mean().item() for key, p in values.items()}
    assert steps["x.lora_A.default.weight"] == pytest.approx(5e-3, rel=1e-3)
    assert steps["x.lora_B.default.weight"] == pytest.approx(16 * 5e-3, rel=1e-3)


def test_schedule_free_is_used_averaged_and_trained_as_before() -> None:
    values = parameters()
    optimizer = build("schedule_free", values)
    for _ in range(5):
        for p in values.values():
            p.grad.copy_(p.detach())
        optimizer.step()
    training = [p.detach().clone() for p in values.values()]
    with averaged_weights("schedule_free", optimizer):
        assert not any(torch.equal(p, t) for p, t in zip(values.values(), training, strict=True))
    for p, tensor in zip(values.values(), training, strict=True):
        assert torch.allclose(p, tensor, atol=1e-6)


def library_factors(schedule: LRScheduler, steps: int) -> list[float]:
    """A library's schedule of a learning rate of 1, step by step."""
    factors = []
    for _ in range(steps):
        factors += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    return factors


def any_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 19])
@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_schedules_with_warm_up_are_those_of_transformers(name: str, warmup_steps: int) -> None:
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        any_optimizer(),
        num_warmup_steps=warmup_steps,
        num_training_steps=20,
    )
    ours = [SCHEDULES[name](step, 20, warmup_steps) for step in range(20)]
    assert ours == pytest.approx(library_factors(theirs, 20), abs=1e-12)
    assert max(ours) == ours[warmup_steps] == 1


def one_cycle(steps: int, share: float) -> LRScheduler:
    """Torch's, with upstream's ends: 4e-6 and 1e-8 for a peak of 1e-4."""
    return OneCycleLR(
        any_optimizer(),
        1.0,
        total_steps=steps,
        pct_start=share,
        div_factor=25,
        final_div_factor=400,
        cycle_momentum=False,
    )


@pytest.mark.parametrize("steps", [*range(4, 61), 100, 1000])
def test_one_cycle_is_torchs_at_every_length(steps: int) -> None:
    ours = [SCHEDULES["one_cycle"](step, steps, 0) for step in range(steps)]
    assert ours == pytest.approx(library_factors(one_cycle(steps, 0.3), steps), rel=1e-9)


@pytest.mark.parametrize("warmup_steps", [2, 5, 19])
def test_one_cycles_warm_up_is_torchs_share(warmup_steps: int) -> None:
    ours = [SCHEDULES["one_cycle"](step, 20, warmup_steps) for step in range(20)]
    theirs = library_factors(one_cycle(20, warmup_steps / 20), 20)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_runs_too_short_for_one_cycles_warm_up_start_at_the_peak() -> None:
    for steps in (1, 2, 3):
        factors = [SCHEDULES["one_cycle"](step, steps, 0) for step in range(steps)]
        assert factors[0] == 1
        assert factors == sorted(factors, reverse=True)
        assert steps == 1 or factors[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_first_step_at_rate_zero_changes_nothing_and_breaks_nothing(name: str) -> None:
    values = parameters()
    optimizer = build(name, values)
    before = [p.detach().clone() for p in values.values()]
    for factor in (0.0, 0.5, 1.0):
        set_learning_rate(optimizer, factor)
        for p in values.values():
            p.grad.copy_(p.detach())
        optimizer.step()
        same = [torch.equal(p, b) for p, b in zip(values.values(), before, strict=True)]
        assert all(same) == (factor == 0)
        assert all(p.isfinite().all() for p in values.values())
