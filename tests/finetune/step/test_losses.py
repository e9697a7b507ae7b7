"""The hybrid loss against an independent float64 computation."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from finetune.step.losses import NoiseTables, hybrid_loss

STEPS = 1000
TIMESTEPS = torch.tensor([0, 1, 2, 10, 250, 500, 900, 998, 999])


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=STEPS,
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
    )


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    pixels = (torch.randint(0, 256, (count, 3, 8, 8), generator=draw) / 127.5 - 1).float()
    noise = torch.randn(pixels.shape, generator=draw)
    prediction = torch.cat(
        [
            noise + 0.1 * torch.randn(noise.shape, generator=draw),
            torch.rand(noise.shape, generator=draw) * 2 - 1,
        ],
        dim=1,
    )
    return pixels, noise, prediction


def bound_in_float64(pixel: float, noise: float, epsilon: float, v: float, t: int) -> float:
    """L_t of one number in bits, straight from the definitions, in Python's doubles.

    The schedule is the cosine one of Improved DDPM, eq. 17, with betas capped at 0.999.
    """

    def f(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((s + 1) / STEPS) / f(s / STEPS), 0.999) for s in range(STEPS)]
    bars = list(np.cumprod([1 - beta for beta in betas]))
    beta, bar = betas[t], bars[t]
    before = bars[t - 1] if t else 1.0
    noisy = math.sqrt(bar) * pixel + math.sqrt(1 - bar) * noise
    alpha = 1 - beta

    # Ho et al., eq. 11: the reverse mean from epsilon
    def mean_from(e: float) -> float:
        return (noisy - beta / math.sqrt(1 - bar) * e) / math.sqrt(alpha)

    clipped = t or 1
    lower = math.log(betas[clipped] * (1 - bars[clipped - 1]) / (1 - bars[clipped]))
    log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * lower
    deviation = math.exp(0.5 * log_variance)
    if t == 0:

        def cdf(x: float) -> float:
            return 0.5 * (1 + math.erf((x - mean_from(epsilon)) / deviation / math.sqrt(2)))

        above = 1.0 if pixel > 0.999 else cdf(pixel + 1 / 255)
        below = 0.0 if pixel < -0.999 else cdf(pixel - 1 / 255)
        return -math.log2(max(above - below, 1e-12))
    true_variance = beta * (1 - before) / (1 - bar)
    difference = mean_from(noise) - mean_from(epsilon)
    variance = math.exp(log_variance)
    nats = 0.5 * (
        log_variance
        - math.log(true_variance)
        + true_variance / variance
        + difference**2 / variance
        - 1
    )
    return nats / math.log(2)


def test_bound_agrees_with_float64(scheduler: DDPMScheduler) -> None:
    pixels, noise, prediction = pictures(len(TIMESTEPS))
    noisy = scheduler.add_noise(pixels, noise, TIMESTEPS)
    losses = hybrid_loss(prediction, pixels, noise, noisy, TIMESTEPS, NoiseTables.of(scheduler))
    epsilon, v = prediction.double().chunk(2, dim=1)
    for row, t in enumerate(TIMESTEPS.tolist()):
        numbers = zip(
            *(x[row].flatten().tolist() for x in (pixels.double(), noise.double(), epsilon, v)),
            strict=True,
        )
        expected = np.mean([bound_in_float64(*four, t) for four in numbers])
        assert losses.bound[row].item() == pytest.approx(expected, rel=2e-4, abs=1e-6), t


def test_mse_is_that_of_epsilon(scheduler: DDPMScheduler) -> None:
    pixels, noise, prediction = pictures(4)
    steps = TIMESTEPS[:4]
    noisy = scheduler.add_noise(pixels, noise, steps)
    losses = hybrid_loss(prediction, pixels, noise, noisy, steps, NoiseTables.of(scheduler))
    expected = torch.nn.functional.mse_loss(prediction[:, :3], noise, reduction="none")
    assert torch.allclose(losses.mse, expected.mean(dim=(1, 2, 3)))
    assert torch.allclose(losses.total, losses.mse + losses.bound)


def test_bound_trains_the_variance_and_never_the_mean(scheduler: DDPMScheduler) -> None:
    pixels, noise, prediction = pictures(4)
    steps = TIMESTEPS[2:6]
    noisy = scheduler.add_noise(pixels, noise, steps)
    exact = torch.cat([noise, prediction[:, 3:]], dim=1).requires_grad_()
    tables = NoiseTables.of(scheduler)
    hybrid_loss(exact, pixels, noise, noisy, steps, tables).total.sum().backward()
    assert exact.grad is not None
    assert exact.grad[:, :3].abs().max() == 0, (
        "with the MSE at its minimum no mean gradient is left"
    )
    assert (exact.grad[:, 3:].abs().amax(dim=(1, 2, 3)) > 0).all()


def test_variance_bounds_are_the_schedulers_own(scheduler: DDPMScheduler) -> None:
    tables = NoiseTables.of(scheduler)
    for t in TIMESTEPS[1:].tolist():
        for v, table in ((-1.0, tables.posterior_log_variance), (1.0, tables.log_betas)):
            published = scheduler._get_variance(t, predicted_variance=torch.tensor(v))
            assert table[t].item() == pytest.approx(published.item(), rel=1e-4)


def test_min_snr_weighs_the_mse_alone(scheduler: DDPMScheduler) -> None:
    pixels, noise, prediction = pictures(len(TIMESTEPS))
    noisy = scheduler.add_noise(pixels, noise, TIMESTEPS)
    arguments = (prediction, pixels, noise, noisy, TIMESTEPS, NoiseTables.of(scheduler))
    plain, weighted = hybrid_loss(*arguments), hybrid_loss(*arguments, min_snr_gamma=5.0)
    bars = scheduler.alphas_cumprod[TIMESTEPS].double()
    snr = bars / (1 - bars)
    expected = plain.mse.double() * snr.clamp(max=5.0) / snr
    assert torch.allclose(weighted.mse.double(), expected, rtol=1e-4)
    assert torch.equal(weighted.bound, plain.bound)
