"""Pictures with captions as a source gives them, row by row, and the words about mistakes in it."""

from dataclasses import dataclass
from typing import Any, Protocol

from adapters.errors import UserError
from adapters.texts import find_flaw
from finetune.data.notes import Notes


@dataclass(frozen=True)
class Wording:
    """The setting that names a source, for messages."""

    setting: str
    """The setting."""
    caption_advice: str
    """The remedy where a caption is missing, apart from writing it."""
    columns: bool = False
    """True if ``data.image_column`` and ``data.caption_column`` name its columns."""

    def advise_column(self, setting: str) -> str:
        """Say which setting would name another column, if any does."""
        return f", or give the right name in data.{setting}" if self.columns else ""


TRAINING = Wording(
    "data.source",
    "or give data.prompt for all pictures (data.caption_dropout trains the empty caption)",
    columns=True,
)
CLASSES = Wording("prior.folder", "or remove all captions: prior.prompts are then used")
SURVEYED = Wording("FOLDER", "or remove all captions: the subject's name is then used")


class Rows(Protocol):
    """The rows of a source, none of which has been decoded."""

    notes: Notes
    """The parts of the source that are not read."""

    def __len__(self) -> int:
        """Count the rows."""
        ...

    def read_captions(self) -> list[str]:
        """Read the caption of each row, without the white space around it.

        Raises:
            UserError: if one is missing, empty or no text.
        """
        ...

    def read_picture(self, row: int) -> tuple[str, bytes]:
        """Read a row's picture: where it is from, and the content of its file.

        Raises:
            UserError: if it cannot be read.
        """
        ...


def check_caption(caption: Any, place: str, wording: Wording) -> str:
    """Return a caption without the white space around it; a UserError if it shows nothing."""
    if caption is not None and not isinstance(caption, str):
        raise UserError(
            f"{place}: the caption must be text (found {caption!r:.60}); write it in quotes,"
            f" {wording.caption_advice}."
        )
    text = (caption or "").strip()
    if flaw := find_flaw(text if text else caption or ""):
        raise UserError(f"{place}: the caption {flaw}, {wording.caption_advice}.")
    return text
