"""Draw the world: emoji sprites on patterned backgrounds, in batches, on any device.

Shapes: B scenes, N objects, P sprite size, S picture size. Pictures are RGB in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from adapters.errors import UserError, listed
from models.world import BACKGROUNDS, COLOURS, PATTERNS, THINGS

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""The font of the Debian package fonts-noto-color-emoji (SIL OFL 1.1)."""
BITMAP_PX = 109
"""The only size in which the font has bitmaps."""
SPRITE_PX = 128
SPRITES = Path(__file__).parent / "sprites"
"""The folder of the sprites that are stored as pictures, so that they need no font."""
SCALES = (0.5, 0.85)
"""The range of an object's longer side as a fraction of the picture, drawn uniformly."""
TILT = 0.26
"""The largest rotation either way, in radians."""
PERIODS = {"plain": 0.25, "striped": 0.25, "checkered": 0.5, "dotted": 0.25}
"""The patterns' periods as fractions of the picture."""
CONTRAST = 0.5
"""The shift of a pattern's second tone towards white, or towards black for light colours."""
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Placement:
    """The place of each scene's object and of its background; [B] float32 each."""

    x: Tensor
    """The object's centre, in [-1, 1] across the picture; y likewise."""
    y: Tensor
    scale: Tensor
    tilt: Tensor
    """The object's rotation, in radians."""
    phase_x: Tensor
    """The start of the pattern, in periods; phase_y likewise."""
    phase_y: Tensor

    @classmethod
    def random(cls, count: int, generator: torch.Generator) -> "Placement":
        """Draw placements for `count` scenes; objects stay inside, except for tilted corners."""
        draw = torch.rand(6, count, generator=generator, device=generator.device)
        low, high = SCALES
        scale = low + (high - low) * draw[2]
        room = 1 - scale
        return cls(
            x=(2 * draw[0] - 1) * room,
            y=(2 * draw[1] - 1) * room,
            scale=scale,
            tilt=(2 * draw[3] - 1) * TILT,
            phase_x=draw[4],
            phase_y=draw[5],
        )

    @property
    def poses(self) -> Tensor:
        """The objects' x, y, scale and tilt, [B, 4]."""
        return torch.stack([self.x, self.y, self.scale, self.tilt], dim=1)


def rasterise(characters: Sequence[str], font: Path = FONT) -> Tensor:
    """Draw emoji as sprites: [N, 4, P, P] uint8 RGBA, cropped to the drawing and centred."""
    face = ImageFont.truetype(str(font), BITMAP_PX)
    sprites = []
    for character in characters:
        canvas = Image.new("RGBA", (2 * BITMAP_PX, 2 * BITMAP_PX))
        ImageDraw.Draw(canvas).text((20, 20), character, font=face, embedded_color=True)
        box = canvas.getbbox()
        assert box is not None, f"the font has no picture of U+{ord(character):X}"
        sprites.append(_square(canvas.crop(box)))
    return torch.stack(sprites)


def _square(drawing: Image.Image) -> Tensor:
    drawing.thumbnail((SPRITE_PX, SPRITE_PX), Image.Resampling.LANCZOS)
    factor = SPRITE_PX / max(drawing.size)
    size = (round(drawing.width * factor), round(drawing.height * factor))
    drawing = drawing.convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    square = Image.new("RGBA", (SPRITE_PX, SPRITE_PX))
    square.paste(drawing, ((SPRITE_PX - size[0]) // 2, (SPRITE_PX - size[1]) // 2))
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(SPRITE_PX, SPRITE_PX, 4).permute(2, 0, 1)


def sprite_file(thing: int) -> Path:
    """Return the place of a stored sprite; `thing` is an index into `THINGS`."""
    return SPRITES / f"{THINGS[thing].name.replace(' ', '_')}.png"


def write_sprites(sprites: Tensor, things: Sequence[int]) -> None:
    """Store the sprites of some things as PNGs; `sprites` are the world's, [N, 4, P, P] uint8."""
    SPRITES.mkdir(exist_ok=True)
    for thing in things:
        pixels = sprites[thing].permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels, "RGBA").save(sprite_file(thing), optimize=True)


def read_sprites(things: Sequence[int], font: Path = FONT) -> Tensor:
    """Read the sprites of some things, [len(things), 4, P, P] uint8.

    Sprites that are not stored are drawn with the font.

    Raises:
        UserError: if a sprite is not stored, and the font is not installed.
    """
    missing = [thing for thing in dict.fromkeys(things) if not sprite_file(thing).exists()]
    if missing and not font.exists():
        raise UserError(
            f"There is no picture of {listed(THINGS[thing].name for thing in missing)} in"
            f" {SPRITES} and no font at {font} to draw it with: install Debian's"
            " fonts-noto-color-emoji, or use captions of stored objects."
        )
    drawn = rasterise([THINGS[thing].character for thing in missing], font) if missing else ()
    found = dict(zip(missing, drawn, strict=True))
    for thing in set(things) - set(missing):
        with Image.open(sprite_file(thing)) as picture:
            found[thing] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return torch.stack([found[thing] for thing in things])


def premultiply(sprites: Tensor) -> Tensor:
    """Convert [N, 4, P, P] uint8 RGBA to float32 in [0, 1], colours multiplied by alpha."""
    sprites = sprites.float() / 255
    return torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], dim=1)


def compose(sprites: Tensor, backgrounds: Tensor, placement: Placement, size_px: int) -> Tensor:
    """Compose scenes, [B, 3, S, S] in [-1, 1].

    Args:
        sprites: [B, 4, P, P] float32, premultiplied: the object of each scene.
        backgrounds: [B] int64, indices into `world.BACKGROUNDS`.
        placement: the place of each scene's object and background.
        size_px: the picture size S.
    """
    fine = size_px * SUPERSAMPLING
    axis = (torch.arange(fine, device=sprites.device) + 0.5) / fine
    scene = _paint(backgrounds, placement, axis, softness_px=fine)
    drawn = place(sprites, placement.poses, fine)
    scene = drawn[:, :3] + (1 - drawn[:, 3:]) * scene
    return F.avg_pool2d(scene, SUPERSAMPLING) * 2 - 1


def place(sprites: Tensor, poses: Tensor, size_px: int) -> Tensor:
    """Draw sprites on nothing: [B, 4, S, S], premultiplied.

    Args:
        sprites: [B, 4, P, P] float32, premultiplied.
        poses: [B, 4], as `Placement.poses`.
        size_px: the picture size S.
    """
    x, y, scale, tilt = poses.unbind(dim=1)
    cos, sin = tilt.cos() / scale, tilt.sin() / scale
    affine = torch.stack([cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y], dim=1)
    shape = [len(sprites), 4, size_px, size_px]
    grid = F.affine_grid(affine.view(-1, 2, 3), shape, align_corners=False)
    return F.grid_sample(sprites, grid, mode="bilinear", align_corners=False)


def _paint(backgrounds: Tensor, placement: Placement, axis: Tensor, softness_px: int) -> Tensor:
    """Draw bare backgrounds, [B, 3, S, S] in [0, 1]; `axis` is [S], pixel centres in [0, 1]."""
    device = axis.device
    colours = torch.tensor(list(COLOURS.values()), device=device) / 255
    periods = torch.tensor([PERIODS[pattern] for pattern in PATTERNS], device=device)
    pattern = backgrounds % len(PATTERNS)
    first = colours[backgrounds // len(PATTERNS)]
    towards = (first.mean(dim=1, keepdim=True) < 0.6).float()
    second = first + CONTRAST * (0.25 + 0.75 * towards) * (towards - first)
    period = periods[pattern].view(-1, 1)
    u = axis / period + placement.phase_x.view(-1, 1)
    v = axis / period + placement.phase_y.view(-1, 1)
    u, v = u[:, None, :].expand(-1, len(axis), -1), v[:, :, None].expand(-1, -1, len(axis))

    def edge(height: Tensor) -> Tensor:
        return (height * softness_px / 16).clamp(-0.5, 0.5) + 0.5

    wave_u, wave_v = (2 * torch.pi * u).sin(), (2 * torch.pi * v).sin()
    heights = (
        torch.full_like(u, -1.0),
        (2 * torch.pi * (u + v)).sin(),
        wave_u * wave_v,
        (2 * torch.pi * u).cos() + (2 * torch.pi * v).cos() - 0.9,
    )
    choice = pattern.view(-1, 1, 1)
    height = sum(h * (choice == i) for i, h in enumerate(heights))
    assert isinstance(height, Tensor)
    mix = edge(height)[:, None]
    return first[:, :, None, None] * (1 - mix) + second[:, :, None, None] * mix


def shrink(pictures: Tensor, size_px: int) -> Tensor:
    """Shrink [B, 3, S, S] to [B, 3, s, s] in [-1, 1], by antialiased bicubics as in Pillow."""
    small = F.interpolate(pictures, (size_px, size_px), mode="bicubic", antialias=True)
    return small.clamp(-1, 1)


def random_scenes(
    atlas: Tensor, things: Tensor, size_px: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw random scenes of given objects: pictures [B, 3, S, S] and backgrounds [B] int64.

    `atlas` is [N, 4, P, P] float32, premultiplied; `things` [B] int64 indexes it.
    """
    backgrounds = torch.randint(
        len(BACKGROUNDS), things.shape, generator=generator, device=generator.device
    )
    placement = Placement.random(len(things), generator)
    return compose(atlas[things], backgrounds, placement, size_px), backgrounds


def draw_scenes(sprites: Tensor, backgrounds: Tensor, size_px: int, seed: int) -> list[Image.Image]:
    """Draw one scene of each sprite, at a random place.

    Args:
        sprites: [B, 4, P, P] uint8: the object of each scene.
        backgrounds: [B] int64, indices into `world.BACKGROUNDS`.
        size_px: the picture size.
        seed: the seed of the places.
    """
    placement = Placement.random(len(sprites), torch.Generator().manual_seed(seed))
    scenes = compose(premultiply(sprites), backgrounds, placement, size_px)
    return [to_image(scene) for scene in scenes]


def to_image(picture: Tensor) -> Image.Image:
    """Turn [3, S, S] in [-1, 1] into an RGB picture."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.cpu().numpy())


def contact_sheet(
    pictures: Sequence[Image.Image], titles: Sequence[str], columns: int, tile_px: int = 128
) -> Image.Image:
    """Lay out pictures in rows, each with its title below it on up to three lines."""
    text_px, margin_px = 11, 6
    pitch = (tile_px + margin_px, tile_px + 3 * (text_px + 2) + margin_px)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * pitch[0] + margin_px, rows * pitch[1] + margin_px), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(text_px)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        corner = margin_px + (i % columns) * pitch[0], margin_px + (i // columns) * pitch[1]
        sheet.paste(picture.resize((tile_px, tile_px), Image.Resampling.BICUBIC), corner)
        lines = _wrap(title, draw, font, tile_px)
        draw.multiline_text((corner[0], corner[1] + tile_px + 1), lines, "black", font, spacing=1)
    return sheet


def _wrap(title: str, draw: ImageDraw.ImageDraw, font: Font, width: int) -> str:
    lines: list[str] = []
    for word in title.split():
        longer = f"{lines[-1]} {word}" if lines else word
        fits = bool(lines) and draw.textlength(longer, font) <= width
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    return "\n".join(lines[:3])
