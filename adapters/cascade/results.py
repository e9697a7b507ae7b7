"""The pictures that a cascade has drawn, to show and to save along with their settings.

Shapes: N pictures, S a stage's picture size, s that of Stage I. Pixels are in [-1, 1].
"""

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import NoReturn, overload

from PIL import Image, PngImagePlugin
from torch import Tensor

from adapters.arguments import expand_home
from adapters.atomic import write_png
from adapters.cascade.provenance import PictureInfo, sheet_texts
from adapters.errors import UserError
from adapters.pictures.contact_sheet import CELL_PX, contact_sheet
from adapters.pictures.png import Signed, pack_texts, plain_texts

SHEET = "contact_sheet.png"
SHEET_COLUMNS = 6

SHEET_PX = 1200
"""The sheet width in px up to which a few large pictures are shown in full size."""

SHOWN_INLINE = 24
"""The number of pictures of a result that a notebook shows."""


@dataclass(frozen=True)
class Sample:
    """The pictures drawn from one seed, one for each stage that ran. Notebooks show the last."""

    pictures: Mapping[int, Image.Image]
    """The pictures, by stage."""
    prompt: str
    seed: int
    flagged: bool
    """True if a safety checker has blackened it, in any stage."""
    info: PictureInfo | None = None
    """The record that its PNG carries."""

    @property
    def final(self) -> Image.Image:
        """The picture of the last stage that ran."""
        return self.pictures[max(self.pictures)]

    @property
    def title(self) -> str:
        """The prompt and seed, for people."""
        return f"{self.prompt} (seed {self.seed})" if self.prompt else f"seed {self.seed}"

    def __repr__(self) -> str:
        sizes = " → ".join(str(picture.width) for picture in self.pictures.values())
        flagged = ", flagged" * self.flagged
        return f"Sample({shorten(self.prompt, 60)!r}, seed {self.seed}, {sizes} px{flagged})"

    def _repr_png_(self) -> bytes:
        return _png(self.final, pack_texts(self._texts(max(self.pictures))))

    def save(self, path: str | Path, stage: int | None = None) -> None:
        """Write a picture as PNG, which carries the record of its settings.

        Read the record with :func:`adapters.cascade.provenance.read_picture_info`; ``prompt`` and
        ``seed`` are also texts of their own.

        Args:
            path: the file to write, which must end in ``.png``.
            stage: the stage of the picture; ``None``: the last stage.

        Raises:
            UserError: if the path does not end in ``.png``.
        """
        file = expand_home(path)
        if file.suffix.lower() != ".png":
            raise UserError(f"{path} must end in .png, the format that carries prompt and seed.")
        number = max(self.pictures) if stage is None else stage
        write_png(file, self.pictures[number], pack_texts(self._texts(number)))

    def _texts(self, stage: int) -> dict[str, str]:
        if self.info is None:
            return plain_texts(self.prompt, self.seed)
        return self.info.of_stage(stage).texts


@dataclass(frozen=True)
class CascadeImages:
    """The pictures of N samples; a stage that did not run has none.

    This is a sequence of :class:`Sample`. A notebook shows it as a contact sheet, and it can be
    pickled.

    Example:
        >>> prompts = ["a cat face on a red background", "a frog face on a blue background"]
        >>> few = Sampling(stage_1=StageSampling(steps=4), stage_2=StageSampling(steps=2))
        >>> images = cascade(prompts, sampling=few)
        >>> images
        CascadeImages(2 pictures, 32 → 128 px, of 'a cat face on a red background', 'a frog face...
        >>> images[1]
        Sample('a frog face on a blue background', seed 1, 32 → 128 px)
        >>> images[1].final.size
        (128, 128)
        >>> [sample.seed for sample in images]
        [0, 1]
        >>> images.save("pictures")
        PosixPath('pictures/contact_sheet.png')
    """

    stage_1: tuple[Image.Image, ...]
    stage_2: tuple[Image.Image, ...]
    stage_3: tuple[Image.Image, ...]
    prompts: tuple[str, ...]
    """The prompt of each picture."""
    seeds: tuple[int, ...]
    """The seed of each picture."""
    low_res: Tensor = field(compare=False)
    """[N, 3, s, s] float32 on the CPU in [-1, 1]: Stage I's pictures before quantisation."""
    flagged: tuple[bool, ...]
    """True for each picture that a safety checker has blackened, in any stage."""
    infos: tuple[PictureInfo, ...] = ()
    """The record of each picture, which its PNG carries."""

    @property
    def images(self) -> NoReturn:
        """An AttributeError: the results of diffusers' pipelines have it, and these ``final``."""
        raise AttributeError("CascadeImages has no images: see final, or [0].final for one")

    @property
    def final(self) -> tuple[Image.Image, ...]:
        """The pictures of the last stage that ran."""
        return self.stage_3 or self.stage_2 or self.stage_1

    @property
    def stages(self) -> dict[int, tuple[Image.Image, ...]]:
        """The pictures of the stages that ran, by number."""
        every = {1: self.stage_1, 2: self.stage_2, 3: self.stage_3}
        return {number: pictures for number, pictures in every.items() if pictures}

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> "CascadeImages": ...

    def __getitem__(self, index: int | slice) -> "Sample | CascadeImages":
        if isinstance(index, slice):
            return CascadeImages(**{name: values[index] for name, values in vars(self).items()})
        return Sample(
            pictures={number: pictures[index] for number, pictures in self.stages.items()},
            prompt=self.prompts[index],
            seed=self.seeds[index],
            flagged=self.flagged[index],
            info=self.infos[index] if self.infos else None,
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        sizes = " → ".join(str(pictures[0].width) for pictures in self.stages.values())
        prompts = ", ".join(repr(shorten(text, 40)) for text in dict.fromkeys(self.prompts))
        used = self.infos[0].adapters if self.infos else {}
        adapters = ", ".join(f"{name} ({adapter})" for name, adapter in used.items())
        said = [
            f"{len(self)} picture{'s' * (len(self) != 1)}",
            f"{sizes} px" * bool(sizes),
            f"{sum(self.flagged)} flagged" * any(self.flagged),
            f"of {shorten(prompts, 120)}" * any(self.prompts),
            f"with {shorten(adapters, 80)}" * bool(adapters),
        ]
        return f"CascadeImages({', '.join(filter(None, said))})"

    def _repr_html_(self) -> str:
        """Format the contact sheet inline, of the first pictures only if there are many."""
        shown = self[:SHOWN_INLINE]
        if not shown:
            return html.escape(repr(self))
        sheet = shown.sheet()
        data = base64.b64encode(_png(sheet, pack_texts(sheet.info))).decode()
        text = html.escape(", ".join(sample.title for sample in shown))
        more = f"<p>and {len(self) - len(shown)} more</p>" * (len(self) > len(shown))
        return (
            f'<img src="data:image/png;base64,{data}" alt="{text}" width="{sheet.width}"'
            f' style="max-width: 100%">{more}'
        )

    def sheet(self) -> Image.Image:
        """Make a contact sheet of the final pictures, with prompts and seeds.

        Its PNG carries the pictures' records, as a JSON list named ``if_pictures``.
        """
        columns = min(len(self), SHEET_COLUMNS)
        cell_px = max(CELL_PX, min(self.final[0].width, SHEET_PX // columns))
        starts = range(0, len(self), columns)
        rows = [self[start : start + columns] for start in starts]
        captions = [[sample.title for sample in row] for row in rows]
        sheet = contact_sheet([row.final for row in rows], captions=captions, cell_px=cell_px)
        return Signed.of(sheet, sheet_texts(self.infos))

    def save(self, folder: str | Path) -> Path:
        """Write each stage's picture as ``000-a-prompt-seed0-stage_1.png``, and a contact sheet.

        The PNGs carry the records of their settings, see :meth:`Sample.save`. Returns the path of
        the contact sheet.
        """
        folder = expand_home(folder)
        for index, sample in enumerate(self):
            name = picture_name(index, sample.prompt, sample.seed)
            for number in sample.pictures:
                sample.save(folder / f"{name}-stage_{number}.png", number)
        write_png(folder / SHEET, self.sheet())
        return folder / SHEET


def picture_name(index: int, prompt: str, seed: int) -> str:
    """Name a picture's file, without its ending: ``000-a-prompt-seed0``."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return "-".join(filter(None, (f"{index:03d}", words, f"seed{seed}")))


def _png(picture: Image.Image, text: PngImagePlugin.PngInfo) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()
