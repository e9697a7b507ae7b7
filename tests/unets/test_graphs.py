"""Recorded functions against the same functions run as they are; a recording needs a GPU."""

import logging
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from adapters.base.source import Source
from adapters.weights.kinds import KINDS, AdapterSpec
from finetune.recipe.schema import Training
from finetune.run.trainee import Trainee
from finetune.step.stages import STAGES
from tests.builders.random_cascade import RandomCascade
from tests.builders.trainees import batch_of, trainee_of
from unets.graphs import KEPT, GraphMemory, Replayed


def test_without_a_gpu_every_call_runs_as_it_is() -> None:
    doubled = Replayed(lambda x: x * 2, "Doubling")
    for value in (1.0, 2.0, 3.0):
        assert doubled(x=torch.tensor([value])).item() == 2 * value


@pytest.mark.gpu
def test_a_replay_computes_with_the_inputs_of_its_own_call() -> None:
    calls = []
    doubled = Replayed(lambda x: calls.append(0) or x * 2, "Doubling")
    for value in (1.0, 2.0, 3.0, 4.0):
        assert doubled(x=torch.tensor([value], device="cuda")).item() == 2 * value
    assert len(calls) == 2  # once as it is, once recorded
    assert doubled(x=torch.ones(5, device="cuda")).tolist() == [2.0] * 5
    doubled.forget()
    assert doubled(x=torch.tensor([7.0], device="cuda")).item() == 14.0


@pytest.mark.gpu
def test_the_recordings_that_were_used_last_are_kept() -> None:
    doubled = Replayed(lambda x: x * 2, "Doubling")
    for size in (*range(1, KEPT + 1), 1, KEPT + 1):  # the second is used least
        for value in (1.0, 2.0, 3.0):
            x = torch.full((size,), value, device="cuda")
            assert doubled(x=x).tolist() == [2 * value] * size
    assert [key[0][1][0] for key in doubled._graphs] == [*range(3, KEPT + 1), 1, KEPT + 1]


@pytest.mark.gpu
def test_recordings_that_share_memory_take_that_of_the_largest() -> None:
    memory, size = GraphMemory(), 64 * 2**20

    def twice_over(x: torch.Tensor) -> torch.Tensor:
        return (x.expand(size // 4) * 2).sum() / (size // 4) + x.expand(size // 4).clone()[:1]

    first, second = (Replayed(twice_over, "Tripling", memory=memory) for _ in range(2))
    taken = []
    for value in (1.0, 2.0, 3.0, 4.0):
        for tripled in (first, second):
            assert tripled(x=torch.tensor([value], device="cuda")).item() == 3 * value
            taken.append(torch.cuda.memory_reserved())
    assert taken[-1] < taken[2] + size
    del tripled, first
    second.forget()
    assert not memory


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_without_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    waiting = Replayed(lambda x: x * x.sum().item(), "Waiting for the GPU")
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING):
        for value in (1.0, 2.0, 3.0):
            assert waiting(x=torch.tensor([value], device="cuda")).item() == value**2
    assert "Waiting for the GPU cannot be recorded as a CUDA graph" in caplog.text
    assert torch.cuda.current_stream() == stream  # bitsandbytes' optimizers are on no other


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
def test_200_fast_steps_are_the_plain_ones_within_the_noise_of_bf16(
    random_cascade: RandomCascade, stage: int
) -> None:
    """Noise is the distance of diffusers' own blocks in bf16 from float32."""
    cuda = torch.device("cuda")
    source = Source(str(random_cascade.stage(stage)), stage)

    def plain(dtype: torch.dtype) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_pretrained(
            source.name, subfolder="unet", torch_dtype=dtype
        ).to(cuda)

    def losses(unet: UNet2DConditionModel, *, recorded: bool) -> torch.Tensor:
        schedulers = tuple(source.scheduler(name) for name in STAGES[stage].schedulers)
        training = Training(steps=200, cuda_graph=recorded)
        trainee = Trainee(STAGES[stage], training, unet, schedulers, seed=0)
        curve = []
        for step in range(200):
            batch = batch_of(trainee, step % 20).to(cuda)
            curve.append(trainee.accumulate(batch).total.mean().clone())
            trainee.update()
        assert bool(trainee.recorded._graphs) == recorded
        return torch.stack(curve).cpu()

    exact = losses(plain(torch.float32), recorded=False)
    noise = (losses(plain(torch.bfloat16), recorded=False) - exact).abs().view(-1, 20).mean(1)
    fast = (losses(source.unet("bf16", cuda), recorded=True) - exact).abs().view(-1, 20).mean(1)
    assert exact[-20:].mean() < exact[:20].mean()
    assert fast.mean() < 1.5 * noise.mean(), f"{fast} against {noise}"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_that_preserve_the_bases_output_are_the_plain_ones(
    random_cascade: RandomCascade, kind: str
) -> None:
    """With one preserved row, two, or none, each of which is a recording of its own."""
    torch.backends.cudnn.allow_tf32 = False

    def steps(*, recorded: bool) -> list[torch.Tensor]:
        """The losses and the gradient of each batch, at weights that stay the same."""
        targets = "attention+conv" if KINDS[kind].convolutions else "attention"
        spec = AdapterSpec(kind=kind, targets=targets)
        trainee = trainee_of(
            random_cascade.stage_2, 2, device="cuda", adapter=spec, cuda_graph=recorded
        )
        draw = torch.Generator().manual_seed(0)
        moved = 0.02 * torch.randn(trainee.weights.values.shape, generator=draw)
        trainee.weights.values += moved.to("cuda")
        trainee.weights.publish()
        found = []
        for index in range(9):  # the third of each number replays
            batch = batch_of(trainee, index, pictures=4)
            if count := (1, 2, 0)[index % 3]:
                batch = replace(batch, preserved=torch.arange(4 - count, 4))
            losses = trainee.accumulate(batch.to(trainee.unet.device))
            gradient = trainee.weights.gradient
            found += [losses.total.clone(), gradient / gradient.norm()]
            gradient.zero_()
        assert len(trainee.recorded._graphs) == (3 if recorded else 0)
        return found

    for plain, fast in zip(steps(recorded=False), steps(recorded=True), strict=True):
        assert (fast - plain).norm() < 1e-3 * plain.norm()
