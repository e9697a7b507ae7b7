"""The mark of a complete export: the checksums of its files, written last."""

from dataclasses import dataclass
from pathlib import Path

from adapters.base.hub import STAGE_FOLDERS
from adapters.checksums import SUMS, find_damage, read_sums, write_sums
from adapters.errors import UserError
from adapters.files.info import AdapterInfo, read_info
from adapters.files.licence import find_copies
from adapters.files.model_card import CARD, SAMPLES
from adapters.files.places import STAGE_FILES, stage_folders


@dataclass(frozen=True)
class Damage:
    """A fault of an export."""

    reason: str
    """The first file that is missing or not as it was written, and why."""
    stage: bool
    """True if it is a file of the stage itself, not the card or another file next to it."""


def mark_complete(folder: Path) -> None:
    """Write the checksums of all files of an export, the last of its files to be written.

    Raises:
        UserError: if the disk refuses.
    """
    names = [f"{stage}/{name}" for stage in STAGE_FOLDERS for name in STAGE_FILES]
    others = [folder / CARD, *(folder / SAMPLES).glob("*.png")]
    others += [copy for stage in (1, 2) for copy in find_copies(folder, stage)]
    names += [file.relative_to(folder).as_posix() for file in others]
    write_sums(folder, [name for name in names if (folder / name).is_file()])


def find_export_damage(folder: Path, stage: str, *, shared: bool) -> Damage | None:
    """Find what is missing, unreadable or changed of one stage of an export; ``None``: nothing.

    Args:
        folder: the export's folder.
        stage: the name of the stage's folder.
        shared: look at the card, its pictures and the licences too.

    The card is a text that its reader may edit, so only one that is no whole text counts.
    """
    if reason := find_damage(folder, [f"{stage}/{name}" for name in STAGE_FILES]):
        # without any mark, it is an export of an earlier version, or one that was interrupted
        return Damage(reason, stage=(folder / SUMS).exists())
    if not shared:
        return None
    others = [name for name in read_sums(folder) if not name.startswith(STAGE_FOLDERS)]
    if CARD not in others:
        return Damage(f"{SUMS} does not list {CARD}", stage=False)
    others.remove(CARD)
    reason = find_damage(folder, others) or _find_damaged_card(folder / CARD)
    return Damage(reason, stage=False) if reason else None


def read_infos(folder: Path) -> list[AdapterInfo]:
    """Read the descriptions of an export's stages, but not of a damaged one."""
    infos = []
    for stage in stage_folders(folder):
        try:
            infos.append(read_info(stage))
        except UserError:  # it is exported again after this one, and then described
            continue
    return infos


def _find_damaged_card(card: Path) -> str | None:
    """Say why a card is no whole text; ``None``: it is one."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return f"{card.name}: {error}"
    return None if text.endswith("\n") and "\0" not in text else f"{card.name} is cut off"
