"""Black and white pixels at the last step, and what teaches the mean."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from finetune.step.losses import NoiseTables, hybrid_loss

SCHEDULER = DDPMScheduler(
    num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", variance_type="learned_range"
)


@pytest.mark.parametrize("pixel", [-1.0, 1.0, 0.0])
@pytest.mark.parametrize("error", [-2.0, 0.0, 2.0])
def test_black_and_white_take_the_whole_tail(pixel: float, error: float) -> None:
    """DDPM (arXiv 2006.11239), eq. 13, at t = 0, in Python's doubles."""
    shape, first = (1, 3, 2, 2), torch.tensor([0])
    pixels, noise = torch.full(shape, pixel), torch.full(shape, 0.3)
    noisy = SCHEDULER.add_noise(pixels, noise, first)
    prediction = torch.cat([noise + error, torch.ones(shape)], dim=1)  # the upper bound: beta
    ours = hybrid_loss(prediction, pixels, noise, noisy, first, NoiseTables.of(SCHEDULER)).bound
    beta = SCHEDULER.betas[0].double().item()
    mean = (float(noisy[0, 0, 0, 0]) - math.sqrt(beta) * (0.3 + error)) / math.sqrt(1 - beta)

    def cdf(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / math.sqrt(2 * beta)))

    above = 1.0 if pixel == 1 else cdf(pixel + 1 / 255)
    below = 0.0 if pixel == -1 else cdf(pixel - 1 / 255)
    assert ours.item() == pytest.approx(-math.log2(above - below), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_the_mean_is_taught_by_the_squared_error_alone(timestep: int) -> None:
    draw = torch.Generator().manual_seed(0)
    shape, steps = (1, 3, 4, 4), torch.tensor([timestep])
    pixels = torch.rand(shape, generator=draw) * 2 - 1
    noise = torch.randn(shape, generator=draw)
    noisy = SCHEDULER.add_noise(pixels, noise, steps)
    prediction = (torch.rand((1, 6, 4, 4), generator=draw) * 2 - 1).requires_grad_()
    losses = hybrid_loss(prediction, pixels, noise, noisy, steps, NoiseTables.of(SCHEDULER))
    losses.total.sum().backward()
    assert prediction.grad is not None
    error = 2 * (prediction.detach()[:, :3] - noise) / noise.numel()
    torch.testing.assert_close(prediction.grad[:, :3], error, rtol=1e-4, atol=1e-7)
