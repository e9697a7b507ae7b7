"""The shape score: 1 for what the world's own renderer draws, less for everything else."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from adapters.errors import UserError
from models.scenes import Placement, compose, premultiply, read_sprites, to_image
from models.shape import C1, C2, match_sprite, shape_score, ssim_map
from models.subjects import SUBJECTS
from models.world import BACKGROUNDS, parse_caption
from tests.builders import ROOT

NAMES = (*SUBJECTS, "zebra", "piano keyboard")
COUNT = len(NAMES)


@pytest.fixture(scope="module")
def sprites() -> Tensor:
    return read_sprites([parse_caption(name)[0] for name in NAMES])


@pytest.fixture(scope="module")
def scenes(sprites: Tensor) -> tuple[list[Image.Image], Placement]:
    """A true render of each sprite at a random place, on a random background."""
    chance = torch.Generator().manual_seed(4)
    placement = Placement.random(COUNT, chance)
    backgrounds = torch.randint(len(BACKGROUNDS), (COUNT,), generator=chance)
    drawn = compose(premultiply(sprites), backgrounds, placement, 128)
    return [to_image(scene) for scene in drawn], placement


def waves(size_px: int, amplitude: float, skew: float, shift: float) -> Tensor:
    y, x = torch.meshgrid(*[torch.arange(size_px, dtype=torch.float64)] * 2, indexing="ij")
    colours = [torch.sin(x * (0.3 + 0.1 * c) + y * skew + shift) for c in range(3)]
    return 0.5 + amplitude * torch.stack(colours)


def test_ssim_is_that_of_scikit_image() -> None:
    """Values of version 0.26.0: `structural_similarity(one, other, data_range=1, channel_axis=0,
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)`."""
    scores = ssim_map(waves(24, 0.4, 0.2, 0), waves(24, 0.35, 0.23, 0.4))
    known = {
        (0, 0): 0.8875088705057992,
        (3, 7): 0.9395860203146699,
        (12, 12): 0.8480971554174651,
        (23, 5): 0.7329227576604312,
    }
    assert [float(scores[0][place]) for place in known] == pytest.approx(list(known.values()))
    assert float(scores[:, 5:-5, 5:-5].mean()) == pytest.approx(0.605645939430839)


def test_ssim_is_the_papers_formula_in_single_precision() -> None:
    one, other = waves(16, 0.4, 0.2, 0), waves(16, 0.3, 0.1, 0.2)
    at = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(at**2) / 4.5)
    weights = window.outer(window) / window.sum() ** 2
    (a, b), row, column = (picture[1, 2:13, 3:14] for picture in (one, other)), 7, 8
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    variances = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    expected = float(luminance * (2 * covariance + C2) / (variances + C2))
    found = ssim_map(one.float(), other.float())[1, row, column]
    assert float(found) == pytest.approx(expected, abs=1e-4)


def test_true_renders_are_found_where_they_were_put(
    scenes: tuple[list[Image.Image], Placement], sprites: Tensor
) -> None:
    pictures, placement = scenes
    for picture, sprite, pose in zip(pictures, sprites, placement.poses, strict=True):
        found = match_sprite(picture, sprite)
        assert found.ssim > 0.96
        assert (found.x, found.y, found.scale, found.tilt) == pytest.approx(pose.tolist(), abs=0.02)


def test_photographs_of_a_subject_show_it(sprites: Tensor) -> None:
    photos = [Image.open(ROOT / "datasets" / "octopus" / f"{i:02d}.png") for i in (1, 3)]
    assert min(shape_score(photos, sprites[NAMES.index("octopus")])) > 0.96


def test_another_object_has_another_shape(
    scenes: tuple[list[Image.Image], Placement], sprites: Tensor
) -> None:
    pictures, _ = scenes
    for picture, another in zip(pictures, sprites.roll(1, dims=0), strict=True):
        assert shape_score([picture], another)[0] < 0.6


def bend(picture: Image.Image, pixels: float) -> Image.Image:
    """Move each row and column to and fro by up to some pixels."""
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, *picture.size], align_corners=False)
    wave = (2 * math.pi * 3 * grid.flip(-1)).sin() * 2 * pixels / picture.width
    scene = torch.tensor(list(picture.tobytes())).view(1, *picture.size, 3).permute(0, 3, 1, 2)
    bent = F.grid_sample(scene / 127.5 - 1, grid + wave, padding_mode="border", align_corners=False)
    return to_image(bent[0])


def test_the_more_a_picture_is_spoilt_the_lower_its_score(
    scenes: tuple[list[Image.Image], Placement], sprites: Tensor
) -> None:
    picture, sprite = scenes[0][0], sprites[0]
    blurred = [picture.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 1, 3)]
    bent = [bend(picture, pixels) for pixels in (0, 1, 3)]
    for spoilt in (blurred, bent):
        scores = shape_score(spoilt, sprite)
        assert all(before - after > 0.03 for before, after in pairwise(scores))


@pytest.mark.parametrize("size", [(64, 48), (16, 16)])
def test_pictures_must_be_square_and_not_too_small(size: tuple[int, int], sprites: Tensor) -> None:
    with pytest.raises(UserError, match=f"must be square, of 32 pixels or more .got {size[0]} by"):
        shape_score([Image.new("RGB", size)], sprites[0])
