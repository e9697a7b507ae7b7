"""The loss IF was trained with: epsilon MSE plus the variational bound of the learned variance.

This is L_hybrid of Improved DDPM (arXiv 2102.09672). IF's UNet predicts six channels: epsilon, and
v, which interpolates the reverse process's log variance between its two bounds (eq. 15). The bound
term is in bits and sees the predicted mean detached, so it trains only the variance; its factor
1/1000 cancels against IF's 1000 steps, as in upstream's code.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor


@dataclass(frozen=True)
class NoiseTables:
    """Coefficients of a DDPM by timestep, each [num_train_timesteps] float32.

    They are computed in float64 from the scheduler's betas. The notation is that of DDPM (arXiv
    2006.11239), eq. 6 and 7, for q(x_{t-1} | x_t, x_0).
    """

    snr: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor
    posterior_log_variance: Tensor
    """The lower bound of the log variance; t = 0 has none and takes that of t = 1."""
    log_betas: Tensor
    """The upper bound of the log variance."""

    @classmethod
    def of(cls, scheduler: DDPMScheduler, device: torch.device | str = "cpu") -> "NoiseTables":
        """Compute the tables of a scheduler."""
        betas = scheduler.betas.double().cpu()
        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        variance[0] = variance[1]
        tables = (
            alphas_cumprod / (1 - alphas_cumprod),
            alphas_cumprod.rsqrt(),
            (1 / alphas_cumprod - 1).sqrt(),
            betas * previous.sqrt() / (1 - alphas_cumprod),
            (1 - previous) * alphas.sqrt() / (1 - alphas_cumprod),
            variance.log(),
            betas.log(),
        )
        return cls(*(table.float().to(device) for table in tables))


@dataclass(frozen=True)
class Losses:
    """The loss of each picture and its parts, [B] each, float32."""

    total: Tensor
    """The sum of the parts."""
    mse: Tensor
    bound: Tensor
    """The bound term, in bits per channel and pixel."""
    preservation: Tensor | None = None
    """The distance from the base's prediction, which is all that counts of a preserved picture and
    zero for the others; ``None``: no picture is preserved."""

    def with_preserved(self, rows: Tensor, distance: Tensor) -> "Losses":
        """Replace the losses of some rows, [k] int64, by their :func:`preservation_loss`, [k]."""
        none = torch.zeros_like(self.mse)
        return Losses(
            total=self.total.index_copy(0, rows, distance),
            mse=self.mse.index_fill(0, rows, 0),
            bound=self.bound.index_fill(0, rows, 0),
            preservation=none.index_copy(0, rows, distance.detach()),
        )


def hybrid_loss(
    prediction: Tensor,
    pixels: Tensor,
    noise: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    tables: NoiseTables,
    *,
    min_snr_gamma: float | None = None,
) -> Losses:
    """Compute L_hybrid of each picture.

    Args:
        prediction: [B, 6, S, S], the UNet's output: epsilon, then v in [-1, 1].
        pixels: [B, 3, S, S], x_0 in [-1, 1].
        noise: [B, 3, S, S], the epsilon that was added.
        noisy: [B, 3, S, S], x_t.
        timesteps: [B] int64.
        tables: the schedule's coefficients, on the same device.
        min_snr_gamma: weight the MSE by min(SNR, gamma) / SNR (arXiv 2303.09556); ``None``: by 1.
    """
    epsilon, v = prediction.float().chunk(2, dim=1)
    mse = squared_error(epsilon, noise)
    if min_snr_gamma is not None:
        snr = tables.snr[timesteps]
        mse = mse * snr.clamp(max=min_snr_gamma) / snr
    bound = variational_bound(epsilon.detach(), v, pixels.float(), noisy.float(), timesteps, tables)
    return Losses(total=mse + bound, mse=mse.detach(), bound=bound.detach())


def squared_error(epsilon: Tensor, noise: Tensor) -> Tensor:
    """Average the squared error of the predicted noise over each picture, [B]."""
    return (epsilon - noise.float()).square().mean(dim=(1, 2, 3))


def preservation_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute each picture's mean squared distance from the base's prediction, [k] float32.

    Args:
        prediction: [k, 6, S, S], the output of the UNet with the adapter.
        target: [k, 6, S, S], the output for the same inputs without it, a constant.
    """
    return squared_error(prediction.float(), target)


def variational_bound(
    epsilon: Tensor,
    v: Tensor,
    pixels: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    tables: NoiseTables,
) -> Tensor:
    """Compute the variational bound's L_t in bits per dimension, [B] (Improved DDPM, section 3.1).

    It is the KL divergence of the predicted reverse step from the true posterior or, at t = 0, the
    negative log likelihood of the 8-bit picture under a discretised Gaussian.
    """

    def at(table: Tensor) -> Tensor:
        return table[timesteps].view(-1, 1, 1, 1)

    def posterior_mean(x0: Tensor) -> Tensor:
        return at(tables.posterior_mean_x0) * x0 + at(tables.posterior_mean_xt) * noisy

    predicted_x0 = (
        at(tables.sqrt_recip_alphas_cumprod) * noisy
        - at(tables.sqrt_recipm1_alphas_cumprod) * epsilon
    )
    predicted_mean = posterior_mean(predicted_x0)
    true_log_variance = at(tables.posterior_log_variance)
    fraction = (v + 1) / 2
    log_variance = fraction * at(tables.log_betas) + (1 - fraction) * true_log_variance
    kl = normal_kl(posterior_mean(pixels), true_log_variance, predicted_mean, log_variance)
    nll = discretized_nll(pixels, predicted_mean, 0.5 * log_variance)
    first = (timesteps == 0).view(-1, 1, 1, 1)
    return torch.where(first, nll, kl).mean(dim=(1, 2, 3)) / math.log(2)


def normal_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """Compute KL(N_1 || N_2) of diagonal Gaussians in nats, elementwise."""
    return 0.5 * (
        log_var_2
        - log_var_1
        + (log_var_1 - log_var_2).exp()
        + (mean_1 - mean_2).square() * (-log_var_2).exp()
        - 1
    )


def discretized_nll(pixels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Compute 8-bit pixels' negative log likelihood in nats, elementwise (DDPM, eq. 13)."""
    inverse_scale = (-log_scale).exp()
    upper = normal_cdf((pixels - mean + 1 / 255) * inverse_scale)
    lower = normal_cdf((pixels - mean - 1 / 255) * inverse_scale)
    upper = torch.where(pixels > 0.999, 1.0, upper)
    lower = torch.where(pixels < -0.999, 0.0, lower)
    return -(upper - lower).clamp(min=1e-12).log()


def normal_cdf(x: Tensor) -> Tensor:
    """Evaluate the standard normal's cumulative distribution function."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
