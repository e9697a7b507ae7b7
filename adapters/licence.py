"""The licences of base models, and what they ask of adapters derived from them."""

import shutil
from pathlib import Path

NAMES = ("LICENSE*", "LICENCE*", "NOTICE*")


def licence_files(base_model: str) -> tuple[Path, ...]:
    """The licence files of a base that is a local folder: beside its model index, or one above."""
    folder = Path(base_model)
    for place in (folder, folder.resolve().parent):
        found = [path for name in NAMES for path in sorted(place.glob(name)) if path.is_file()]
        if found and folder.is_dir():
            return tuple(found)
    return ()


def is_deepfloyd(base_model: str) -> bool:
    """Whether a base is under the DeepFloyd licence: by its hub name or its licence file."""
    return base_model.startswith("DeepFloyd/") or any(
        "DeepFloyd" in path.read_text(encoding="utf-8", errors="replace")
        for path in licence_files(base_model)
    )


def copy_licences(base_model: str, folder: Path) -> tuple[Path, ...]:
    """Copy a local base's licence files into a folder."""
    return tuple(
        Path(shutil.copyfile(path, folder / path.name)) for path in licence_files(base_model)
    )
