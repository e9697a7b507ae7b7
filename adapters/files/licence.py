"""The licences of base models, and the notice that adapters derived from them must carry."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from adapters.base.hub import STAGE_FOLDERS

# the usual spellings, as the hub's client matches case-sensitively
NAMES = tuple(f"{name}*" for name in ("LICENSE", "LICENCE", "License", "license", "NOTICE"))

DEEPFLOYD = "DeepFloyd/"
"""The prefix of the hub names of DeepFloyd's models."""


def licence_files(base_model: str, revision: str | None = None) -> tuple[Path, ...]:
    """Find the licence files of a base, downloaded if necessary; none if they cannot be obtained.

    They are in its folder, or next to it if its name is ``stage_1`` ...
    """
    folder = Path(base_model).resolve()
    if not folder.is_dir():
        try:
            snapshot = snapshot_download(base_model, revision=revision, allow_patterns=list(NAMES))
        except (OSError, HFValidationError):  # no connection, no access, or not a hub name
            return ()
        folder = Path(snapshot)
    of_cascade = folder.name in (*STAGE_FOLDERS, "stage_3")
    places = [folder, folder.parent] if of_cascade else [folder]
    found = ([path for name in NAMES for path in sorted(place.glob(name))] for place in places)
    return tuple(next(filter(None, found), ()))


def is_deepfloyd(base_model: str, revision: str | None = None) -> bool:
    """Tell from a base's hub name or licence files whether it is under the DeepFloyd licence."""
    return base_model.startswith(DEEPFLOYD) or any(
        "DeepFloyd" in path.read_text(encoding="utf-8", errors="replace")
        for path in licence_files(base_model, revision)
    )


def find_copies(folder: Path, stage: int) -> tuple[Path, ...]:
    """Find the licence files of a stage that :func:`copy_licences` wrote into a folder."""
    return tuple(path for name in NAMES for path in sorted(folder.glob(f"stage_{stage}-{name}")))


def copy_licences(base_model: str, revision: str | None, folder: Path, stage: int) -> None:
    """Copy a base's licence files into a folder, named as in ``stage_1-LICENSE``."""
    for path in licence_files(base_model, revision):
        shutil.copyfile(path, folder / f"stage_{stage}-{path.name}")
