"""Contact sheets: pictures in rows and columns, with captions."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL_PX = 192
"""The side of the square that each picture is fitted into."""

GAP_PX, TEXT_PX, LINE_PX, TITLE_PX = 8, 14, 18, 20

LONGEST_CAPTION = 500
"""The most letters of a caption that are shown."""

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    cell_px: int = CELL_PX,
) -> Image.Image:
    """Arrange pictures on a white sheet.

    Args:
        rows: the pictures; rows may differ in length, and pictures in size.
        row_captions: texts to the left of the rows, one for each, or none at all.
        column_captions: texts below the last row, one for each column, in place of its captions.
        captions: texts below the pictures, row by row.
        title: a text above everything.
        cell_px: the side of a cell; smaller pictures are enlarged without smoothing.
    """
    font, title_font = (ImageFont.load_default(size) for size in (TEXT_PX, TITLE_PX))
    texts = list(captions) or [()] * len(rows)
    if column_captions:
        texts[-1] = column_captions
    below = [[_wrap(text, font, cell_px) for text in row] for row in texts]
    pitch = cell_px + GAP_PX
    heights = [
        pitch + LINE_PX * max(map(len, row), default=0) + GAP_PX * bool(row) for row in below
    ]
    left = GAP_PX + max((_width(text, font) + GAP_PX for text in row_captions), default=0)
    top = TITLE_PX + 2 * GAP_PX if title else GAP_PX
    width = max(left + max(map(len, rows)) * pitch, _width(title, title_font) + 2 * GAP_PX)
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP_PX, GAP_PX), title, "black", title_font)
    for index, (row, captioned, height) in enumerate(zip(rows, below, heights, strict=True)):
        if row_captions:
            place = (GAP_PX, top + cell_px // 2)
            draw.text(place, row_captions[index], "black", font, anchor="lm")
        for column, picture in enumerate(row):
            sheet.paste(_fit(picture, cell_px), (left + column * pitch, top))
        for column, lines in enumerate(captioned):
            centre = left + column * pitch + cell_px // 2
            for number, line in enumerate(lines):
                y = top + cell_px + GAP_PX // 2 + number * LINE_PX
                draw.text((centre, y), line, "black", font, anchor="ma")
        top += height
    return sheet


def _fit(picture: Image.Image, cell_px: int) -> Image.Image:
    enlarged = max(picture.size) < cell_px
    resample = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return ImageOps.pad(picture.convert("RGB"), (cell_px, cell_px), resample, "white")


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines no wider than ``width`` pixels, within words where it must be."""
    if len(text) > LONGEST_CAPTION:
        text = f"{text[:LONGEST_CAPTION]}…"
    lines = [""]
    for word in text.split():
        line = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(line, font) > width:
            lines.append("")
            line = word
        while len(line) > 1 and _width(line, font) > width:
            widths = [_width(line[:count], font) for count in range(2, len(line))]
            fitting = 1 + bisect_right(widths, width)
            lines[-1:] = [line[:fitting], ""]
            line = line[fitting:]
        lines[-1] = line
    return lines


def _width(text: str, font: Font) -> int:
    return int(font.getlength(text)) + 1
