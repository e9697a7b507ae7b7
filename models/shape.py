"""Measure how well a picture shows a sprite: SSIM within its outline, at the best pose.

SSIM is the structural similarity of Wang et al., "Image quality assessment: from error visibility
to structural similarity" (2004), with their Gaussian window and constants, averaged over colours.

A picture is compared with itself after the real sprite has been pasted over it, and SSIM is
averaged within the sprite's outline; so the background does not matter. The pose is searched for:
first by normalised cross-correlation over all positions, scales and tilts of a grid, at 32 px, then
by climbing from the best of these, at growing sizes.

Shapes: K poses, S picture size, P sprite size. A pose is x, y, scale and tilt, as in
`scenes.Placement`. Here pixels are in [0, 1] and sprites premultiplied float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adapters.errors import UserError
from models.scenes import SCALES, SPRITE_PX, SUPERSAMPLING, TILT, place, premultiply

SIGMA, RADIUS = 1.5, 5
"""The standard deviation of SSIM's Gaussian window, and where it is cut off, in pixels."""
C1, C2 = 0.01**2, 0.03**2
"""The constants that keep SSIM's ratios finite, for pixels in [0, 1]."""

COARSE_PX = 32
MARGIN = 0.05
"""How far the grid of scales and tilts extends beyond the world's own range."""
GRID = (7, 5)
"""The numbers of scales and tilts."""
FLAT = 3e-3
"""A variance added to those in the correlation, lest it follow noise in flat parts."""


@dataclass(frozen=True, kw_only=True)
class Climb:
    """A part of the search: the best poses so far, moved at one picture size."""

    size_px: int | None
    """The size; `None`: the picture's own."""
    poses: int
    """The number of poses to continue with."""
    steps: tuple[float, ...]
    """The largest move in each round, in pixels at the sprite's edge."""


CLIMBS = (
    Climb(size_px=32, poses=GRID[0], steps=(1, 0.7, 0.5)),
    Climb(size_px=64, poses=3, steps=(1, 0.5)),
    Climb(size_px=None, poses=1, steps=(0.5, 0.25, 0.12)),
)
"""The search after the coarse one, from small pictures to the full size."""

LOWEST = (-1.0, -1.0, SCALES[0] - 2 * MARGIN, -TILT - 2 * MARGIN)
HIGHEST = (1.0, 1.0, SCALES[1] + 2 * MARGIN, TILT + 2 * MARGIN)
"""The bounds of the search: beyond them, a match is of something else."""
ONE_PIXEL = (2.0, 2.0, 2.0, 3.0)
"""The change of each of a pose's values that moves a sprite's edge by one pixel, times S."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The pose at which a picture shows a sprite best."""

    ssim: float
    """The mean SSIM within the sprite's outline there, at most 1."""
    x: float
    """The sprite's centre, in [-1, 1] across the picture; y likewise."""
    y: float
    scale: float
    tilt: float


def shape_score(pictures: Sequence[Image.Image], sprite: Tensor) -> list[float]:
    """Compute each picture's SSIM with a sprite within its outline, at the best pose, at most 1.

    Args:
        pictures: square pictures of 32 px or more; larger ones than the sprite are shrunk to it.
        sprite: [4, P, P] uint8 RGBA, as `scenes.read_sprites` returns them.

    Raises:
        UserError: if a picture is not square, or smaller than 32 px.
    """
    return [match_sprite(picture, sprite).ssim for picture in pictures]


def match_sprite(picture: Image.Image, sprite: Tensor) -> Match:
    """Find the pose at which a picture shows a sprite best; see `shape_score`."""
    pixels, drawing = _read(picture), premultiply(sprite[None])
    own_px = pixels.shape[-1]
    poses = _correlate(_resize(pixels, COARSE_PX), _resize(drawing, COARSE_PX))
    for climb in CLIMBS:
        size_px = min(climb.size_px or own_px, own_px)
        pasting = _Pasting(_resize(pixels, size_px), _resize(drawing, size_px))
        poses = poses[pasting.score(poses).topk(climb.poses).indices]
        for step in climb.steps:
            poses = pasting.climb(poses, step)
    # as the world's renderer draws: finer, then averaged
    drawn = _resize(place(drawing, poses, SUPERSAMPLING * SPRITE_PX), own_px)
    x, y, scale, tilt = poses[0].tolist()
    return Match(ssim=float(pasting.score_drawn(drawn)), x=x, y=y, scale=scale, tilt=tilt)


def ssim_map(one: Tensor, other: Tensor) -> Tensor:
    """Compute SSIM around every pixel of [..., S, S] in [0, 1]; pictures are mirrored at edges."""
    return _ssim_map(one, _local_moments(one), other)


def _local_moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
    mean = _blur(pictures)
    return mean, _blur(pictures * pictures) - mean * mean


def _ssim_map(one: Tensor, moments: tuple[Tensor, Tensor], other: Tensor) -> Tensor:
    (mean, variance), (other_mean, other_variance) = moments, _local_moments(other)
    covariance = _blur(one * other) - mean * other_mean
    # equation 13 of the paper
    likeness = (2 * mean * other_mean + C1) * (2 * covariance + C2)
    return likeness / ((mean**2 + other_mean**2 + C1) * (variance + other_variance + C2))


def _blur(pictures: Tensor) -> Tensor:
    # on one core, products with a matrix take a sixth of the time of convolutions
    matrix = _blur_matrix(pictures.shape[-1]).to(pictures)
    return matrix @ pictures @ matrix.T


@cache
def _blur_matrix(size_px: int) -> Tensor:
    """Make the matrix that blurs a line of pixels with SSIM's window, [S, S] float64."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window /= window.sum()
    line = torch.eye(size_px, dtype=torch.float64)
    mirrored = torch.cat([line[:RADIUS].flip(0), line, line[-RADIUS:].flip(0)])
    return torch.einsum("sij,j->si", mirrored.unfold(0, len(window), 1), window)


class _Pasting:
    """One picture, [3, S, S], compared with itself after a sprite, [1, 4, P, P], is pasted on."""

    def __init__(self, picture: Tensor, sprite: Tensor) -> None:
        self.picture, self.sprite = picture, sprite
        self.moments = _local_moments(picture)

    def score(self, poses: Tensor) -> Tensor:
        """Compute the mean SSIM within the sprite's outline at each pose, [K]."""
        sprites = self.sprite.expand(len(poses), -1, -1, -1)
        return self.score_drawn(place(sprites, poses, self.picture.shape[-1]))

    def score_drawn(self, drawn: Tensor) -> Tensor:
        """Compute the same of sprites in their places, [K, 4, S, S]."""
        alpha = drawn[:, 3:]
        pasted = drawn[:, :3] + (1 - alpha) * self.picture
        scores = _ssim_map(self.picture, self.moments, pasted).mean(dim=1, keepdim=True)
        return (scores * alpha).sum((1, 2, 3)) / alpha.sum((1, 2, 3))

    def climb(self, poses: Tensor, step: float) -> Tensor:
        """Move each pose, [K, 4], by up to a step in each value, to where the score is best.

        It tries a step either way in each of the four values, and all four at once, each to the
        top of the parabola through its three scores.
        """
        move = torch.tensor(ONE_PIXEL) / self.picture.shape[-1] * step
        count, low, high = len(poses), torch.tensor(LOWEST), torch.tensor(HIGHEST)
        axes = torch.cat([torch.zeros(1, 4), torch.eye(4), -torch.eye(4)])
        tried = (poses[:, None] + axes * move).clamp(low, high)
        scores = self.score(tried.flatten(0, 1)).view(count, len(axes))
        here, ahead, behind = scores.split([1, 4, 4], dim=1)
        bend = ahead + behind - 2 * here
        slope = ahead - behind
        top = torch.where(bend < 0, -slope / (2 * bend), slope.sign()).clamp(-1, 1)
        together = (poses + top * move).clamp(low, high)
        tried = torch.cat([tried, together[:, None]], dim=1)
        scores = torch.cat([scores, self.score(together)[:, None]], dim=1)
        return tried[torch.arange(count), scores.argmax(dim=1)]


def _correlate(picture: Tensor, sprite: Tensor) -> Tensor:
    """Find the best place for each scale by normalised cross-correlation, [scales, 4].

    Colours are correlated together, each about its own mean, weighted by the sprite's alpha.
    `picture`: [3, S, S]; `sprite`: [1, 4, P, P].
    """
    size_px = picture.shape[-1]
    scales = torch.linspace(SCALES[0] - MARGIN, SCALES[1] + MARGIN, GRID[0])
    tilts = torch.linspace(-TILT - MARGIN, TILT + MARGIN, GRID[1])
    grid = torch.cartesian_prod(scales, tilts)
    poses = torch.cat([torch.zeros_like(grid), grid], dim=1)
    drawn = place(sprite.expand(len(grid), -1, -1, -1), poses, size_px)
    colours, alpha = drawn[:, :3], drawn[:, 3:]
    area = alpha.sum((2, 3), keepdim=True)
    centred = colours - alpha * (colours.sum((2, 3), keepdim=True) / area)
    variance = (centred**2 / alpha.clamp(min=1e-3)).sum((1, 2, 3))

    reach_px = int(size_px * (1 - float(scales[0])) / 2) + 1  # as far as the smallest stays inside
    scene = F.pad(picture[None], (reach_px,) * 4, mode="replicate")
    covariances = F.conv2d(scene, centred)[0]
    sums = F.conv2d(scene.transpose(0, 1), alpha)  # [3, K, ...]
    squares = F.conv2d((scene**2).sum(dim=1, keepdim=True), alpha)[0]
    area = area[:, 0]
    variances = squares - (sums**2).sum(dim=0) / area
    normaliser = (variances.clamp(min=0) + FLAT * area) * (variance[:, None, None] + FLAT * area)
    correlations = (covariances / normaliser.sqrt()).view(len(scales), -1)

    side = 2 * reach_px + 1
    best = correlations.argmax(dim=1)
    tilt, row, column = best // side**2, best // side % side, best % side
    x, y = (2 * (where - reach_px) / size_px for where in (column, row))
    return torch.stack([x, y, scales, tilts[tilt]], dim=1)


def _resize(pictures: Tensor, size_px: int) -> Tensor:
    """Shrink [..., S, S] by averaging."""
    if pictures.shape[-1] == size_px:
        return pictures
    return F.adaptive_avg_pool2d(pictures, size_px)


def _read(picture: Image.Image) -> Tensor:
    """Turn a picture into [3, S, S] float32 in [0, 1], no larger than a sprite."""
    if picture.width != picture.height or picture.width < COARSE_PX:
        raise UserError(
            f"A picture whose shape is scored must be square, of {COARSE_PX} pixels or more (got"
            f" {picture.width} by {picture.height}); crop or redraw it."
        )
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    return _resize(pixels, min(picture.width, SPRITE_PX))
