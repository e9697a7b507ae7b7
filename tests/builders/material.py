"""What a run reads before it trains, as a command."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from adapters.errors import command_line, quiet_libraries
from finetune.data.pictures import load_pictures
from finetune.recipe.file import load_recipe
from finetune.train import check_material

BASE = Path("models/if-tiny/stage_1").resolve()
SOURCE = "pictures"
"""The folder of pictures that a recipe of :func:`training` names."""


def training(folder: Path, *overrides: str, **sections: object) -> list[str]:
    """Write a recipe for pictures in a folder; return the command line that trains on them."""
    recipe = {
        "name": "given",
        "base": {"stage_1": str(BASE)},
        "data": {"source": str(folder / SOURCE)},
        "stage_1": {"steps": 1},
        "runs_dir": str(folder / "runs"),
        "cache_dir": str(folder.parent / "cache"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | sections))
    return [str(file), *overrides]


def read_material(arguments: Sequence[str]) -> None:
    """Read the pictures and captions of a command line as training does, up to its first step."""
    with command_line():
        quiet_libraries()
        recipe = load_recipe(arguments[0], arguments[1:])
        pictures = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
        check_material(recipe, pictures)
