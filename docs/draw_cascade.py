"""Draw docs/cascade.svg: the parts of the cascade, with pictures of the embedded one.

python docs/draw_cascade.py
"""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from adapters import Cascade, Sampling, StageSampling, load_cascade

PROMPT = "a cat face on a blue striped background"
SEED = 3

WIDTH, TOP, PITCH = 470, 64, 172
"""The width, the top of the first row and the distance between rows, in px."""

BOX_LEFT, BOX_WIDTH, BOX_HEIGHT = 112, 164, 104
PICTURE_LEFT = 318

TEXT, FROZEN, ADAPTER = "#222222", "#e8eaee", "#f2b84b"


@dataclass(frozen=True)
class Row:
    """A stage: its title, what it is given and does, and the picture that it draws."""

    title: str
    lines: tuple[str, ...]
    size_px: int
    """The side of the published model's picture."""
    side: int
    """The side of its picture in the drawing, in px."""


ROWS = (
    Row("Stage I", ("UNet: noise becomes", "a small picture.", "Learns shape, colour"), 64, 72),
    Row(
        "Stage II",
        ("UNet: enlarges it,", "itself noised a little.", "Learns fine detail"),
        256,
        100,
    ),
    Row(
        "Stage III",
        ("Upscaler, with a text", "encoder of its own.", "Used, not trained"),
        1024,
        124,
    ),
)

TRAINED = ROWS[:2]
"""The stages that have adapters, and are given T5's encodings."""


def main() -> None:
    """Draw the embedded cascade's pictures, and write the drawing around them."""
    cascade = load_cascade("models/if-tiny/stage_1", "models/if-tiny/stage_2", device="cpu")
    out = Path(__file__).with_name("cascade.svg")
    out.write_text("\n".join(draw(draw_pictures(cascade))) + "\n", encoding="utf-8")


def draw_pictures(cascade: Cascade) -> list[Image.Image]:
    """Draw the prompt: the pictures of Stage I and of Stage II."""
    sampling = Sampling(
        stage_1=StageSampling(steps=50, guidance=3.0),
        stage_2=StageSampling(steps=20, guidance=1.0, noise_level=100),
    )
    drawn = cascade(PROMPT, seed=SEED, sampling=sampling)[0]
    return [drawn.pictures[1], drawn.pictures[2]]


def draw(pictures: list[Image.Image]) -> Iterator[str]:
    """Yield the drawing's lines, as SVG."""
    height = TOP + PITCH * len(ROWS) + 34
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' font-family="sans-serif" font-size="13" fill="{TEXT}">'
    )
    yield (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path d="M0,0L8,4L0,8z"/></marker></defs>'
    )
    yield f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    yield from _text_encoder(TOP + PITCH + BOX_HEIGHT + 12)
    for number, row in enumerate(ROWS):
        yield from _stage(row, TOP + PITCH * number, pictures[min(number, len(pictures) - 1)])
        if number:
            below = TOP + PITCH * (number - 1) + ROWS[number - 1].side + 24
            top = TOP + PITCH * number
            middle = PICTURE_LEFT + ROWS[number - 1].side // 2
            yield _arrow(f"M{middle},{below}V{top - 12}H{BOX_LEFT + 90}V{top - 2}")
    foot = height - 12
    yield f'<rect x="16" y="{foot - 11}" width="14" height="14" fill="{FROZEN}" stroke="#888"/>'
    yield f'<text x="36" y="{foot}">frozen, as published</text>'
    yield f'<rect x="186" y="{foot - 11}" width="14" height="14" fill="{ADAPTER}" stroke="#888"/>'
    yield f'<text x="206" y="{foot}">adapter: the part that trains</text>'
    yield "</svg>"


def _text_encoder(bottom: int) -> Iterator[str]:
    yield f'<text x="16" y="22" font-style="italic">“{escape(PROMPT)}”</text>'
    yield _arrow(f"M50,30V{TOP - 14}")
    yield f'<rect x="16" y="{TOP - 12}" width="68" height="{bottom - TOP + 12}" {_frame(FROZEN)}/>'
    middle = (TOP - 12 + bottom) // 2
    yield (
        f'<text transform="translate(46,{middle}) rotate(-90)" text-anchor="middle"'
        ' font-weight="bold">T5 text encoder</text>'
        f'<text transform="translate(66,{middle}) rotate(-90)" text-anchor="middle">'
        "encodes each caption, once</text>"
    )


def _stage(row: Row, top: int, picture: Image.Image) -> Iterator[str]:
    middle = top + BOX_HEIGHT // 2
    if row in TRAINED:
        yield _arrow(f"M84,{middle}H{BOX_LEFT - 2}")
    yield f'<rect x="{BOX_LEFT}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" ' + (
        f"{_frame(FROZEN)}/>"
    )
    yield f'<text x="{BOX_LEFT + 10}" y="{top + 21}" font-weight="bold">{row.title}</text>'
    for number, line in enumerate(row.lines):
        y = top + 40 + 17 * number
        yield f'<text x="{BOX_LEFT + 10}" y="{y}">{escape(line)}</text>'
    if row in TRAINED:
        yield (
            f'<rect x="{BOX_LEFT + 90}" y="{top + 7}" width="64" height="19" {_frame(ADAPTER)}/>'
            f'<text x="{BOX_LEFT + 122}" y="{top + 21}" text-anchor="middle">adapter</text>'
        )
    yield _arrow(f"M{BOX_LEFT + BOX_WIDTH},{middle}H{PICTURE_LEFT - 4}")
    yield (
        f'<image x="{PICTURE_LEFT}" y="{top}" width="{row.side}" height="{row.side}"'
        f' style="image-rendering:auto" href="{_data_url(picture)}"/>'
        f'<text x="{PICTURE_LEFT}" y="{top + row.side + 16}">{row.size_px} px</text>'
    )


def _frame(colour: str) -> str:
    return f'rx="5" fill="{colour}" stroke="#888"'


def _arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{TEXT}" marker-end="url(#tip)"/>'


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


if __name__ == "__main__":
    main()
