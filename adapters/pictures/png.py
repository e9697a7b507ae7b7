"""The texts that a PNG carries."""

from collections.abc import Mapping
from typing import Any

from PIL import Image, PngImagePlugin

PICTURE_KEY = "if_picture"
"""The text chunk of a PNG that holds a :class:`PictureInfo` as JSON."""

SHEET_KEY = "if_pictures"
"""The text chunk of a contact sheet that holds its pictures' records as a JSON list."""

PICTURE_TEXTS = ("prompt", "seed", PICTURE_KEY, SHEET_KEY)
"""The names of the texts that this toolkit's PNGs carry."""


class Signed(Image.Image):
    """A picture whose PNG carries texts, wherever it is saved; pictures derived from it do not."""

    @classmethod
    def of(cls, picture: Image.Image, texts: Mapping[str, str]) -> "Signed":
        """Copy a picture, and add texts."""
        signed = cls()
        signed.__setstate__(picture.__getstate__())
        signed.info = dict(picture.info)
        signed.info.update(texts)
        return signed

    def save(self, *place: Any, **params: Any) -> None:
        """Save as Pillow does, a PNG with the picture's texts unless others are given."""
        super().save(*place, **{"pnginfo": pack_texts(self.info)} | params)


def plain_texts(prompt: str, seed: int) -> dict[str, str]:
    """Name the prompt and seed as texts of a PNG."""
    return {"prompt": prompt, "seed": str(seed)}


def pack_texts(texts: Mapping[Any, Any]) -> PngImagePlugin.PngInfo:
    """Pack texts into the chunks of a PNG; other entries of a picture's ``info`` are left out."""
    chunks = PngImagePlugin.PngInfo()
    for name in PICTURE_TEXTS:
        if name in texts:
            chunks.add_itxt(name, texts[name])
    return chunks
