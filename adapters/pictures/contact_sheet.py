"""Contact sheets: pictures in rows and columns, with captions a person can read."""

from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

CELL_PX = 192
"""The side of the square that each picture is fitted into."""

GAP_PX, TEXT_PX, TITLE_PX = 8, 14, 20

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
    """Pictures on a white sheet.

    Args:
        rows: the pictures; rows may differ in length, pictures in size.
        row_captions: to the left of each row, none for no such column.
        column_captions: below the last row, one a column.
        captions: below each picture, row by row.
        title: above everything.
        cell_px: the side of a cell; smaller pictures are enlarged without smoothing.
    """
    font = ImageFont.load_default(TEXT_PX)
    columns = max(len(row) for row in rows)
    left = GAP_PX + max((_width(text, font) + GAP_PX for text in row_captions), default=0)
    below = [_lines(texts, font, cell_px) for texts in captions] or [[] for _ in rows]
    foot = _lines(column_captions, font, cell_px)
    top = TITLE_PX + 2 * GAP_PX if title else GAP_PX
    heights = [cell_px + GAP_PX + _height(texts) for texts in below]
    title_font = ImageFont.load_default(TITLE_PX)
    width = max(left + columns * (cell_px + GAP_PX), _width(title, title_font) + 2 * GAP_PX)
    size = (width, top + sum(heights) + _height(foot))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP_PX, GAP_PX), title, "black", title_font)
    y = top
    for index, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if row_captions:
            place = (GAP_PX, y + cell_px // 2)
            draw.text(place, row_captions[index], "black", font, anchor="lm")
        for column, picture in enumerate(row):
            x = left + column * (cell_px + GAP_PX)
            sheet.paste(_fitted(picture, cell_px), (x, y))
        _write(draw, below[index], left, y + cell_px, cell_px, font)
        y += height
    _write(draw, foot, left, y - GAP_PX, cell_px, font)
    return sheet


def _fitted(picture: Image.Image, cell_px: int) -> Image.Image:
    scale = cell_px / max(picture.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    fitted = picture.convert("RGB").resize(
        (round(picture.width * scale), round(picture.height * scale)), resample
    )
    cell = Image.new("RGB", (cell_px, cell_px), "white")
    cell.paste(fitted, ((cell_px - fitted.width) // 2, (cell_px - fitted.height) // 2))
    return cell


def _lines(texts: Sequence[str], font: Font, width: int) -> list[list[str]]:
    """Each text broken into lines no wider than ``width`` pixels."""
    return [_wrapped(text, font, width) for text in texts]


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _width(text: str, font: Font) -> int:
    return int(font.getlength(text)) + 1


def _height(texts: Sequence[Sequence[str]]) -> int:
    """How many pixels captions take below a row."""
    return max((len(lines) for lines in texts), default=0) * (TEXT_PX + 4) + (
        GAP_PX if texts else 0
    )


def _write(
    draw: ImageDraw.ImageDraw,
    texts: Sequence[Sequence[str]],
    left: int,
    top: int,
    cell_px: int,
    font: Font,
) -> None:
    for column, lines in enumerate(texts):
        centre = left + column * (cell_px + GAP_PX) + cell_px // 2
        for number, line in enumerate(lines):
            y = top + GAP_PX // 2 + number * (TEXT_PX + 4)
            draw.text((centre, y), line, "black", font, anchor="ma")
