"""The loaded adapters of a cascade and their scales: as a table, and the names they may have."""

import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from adapters.errors import UserError
from adapters.files.stage_adapter import StageAdapter
from adapters.tables import format_table

NAMELESS = ("adapters", "stage_1", "stage_2", "adapter_model", "pytorch_lora_weights", "..")
"""Folder and file names too common to name an adapter after."""


class Listing(dict[str, dict[int, float]]):
    """The scale of each adapter in each of its stages, by name; prints as a table.

    ``Cascade.set_adapters`` accepts one. It only shows the adapters: it cannot be changed.
    """

    def __init__(self, loaded: Mapping[str, Mapping[int, tuple[StageAdapter, float]]]) -> None:
        super().__init__(
            (name, {stage: scale for stage, (_, scale) in stages.items()})
            for name, stages in loaded.items()
        )
        self._rows = [
            (name, str(stage), f"{scale:g}", adapter.kind, str(adapter.folder))
            for name, stages in loaded.items()
            for stage, (adapter, scale) in stages.items()
        ]

    def __str__(self) -> str:
        header = ("adapter", "stage", "scale", "kind", "from")
        return format_table([header, *self._rows], left=len(header))

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise UserError(
            "cascade.adapters only shows the adapters: call cascade.set_adapters({name: scale}) to"
            " change scales, add_adapter(folder, scale) to add one, remove_adapter(name) to remove"
            " one."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def check_loaded(self, name: str) -> None:
        """Raise a UserError, with the closest name, if no loaded adapter is called ``name``."""
        if name in self:
            return
        if not self:
            raise UserError(f"No adapter is called {name!r}, as none are loaded; add it first.")
        (closest,) = difflib.get_close_matches(name, self, n=1, cutoff=0)
        raise UserError(
            f"No adapter is called {name!r}; did you mean {closest!r}? Loaded: {', '.join(self)}."
        )

    def check_free(self, name: str) -> None:
        """Raise a UserError if a loaded adapter is called ``name``."""
        if name in self:
            raise UserError(f"An adapter called {name!r} is loaded already; choose another name.")

    def choose_name(self, folder: Path) -> str:
        """Choose a free name after a folder or file, with a number if the plain one is taken."""
        parts = [part.removesuffix(".safetensors") for part in folder.absolute().parts[1:]]
        telling = (part for part in reversed(parts) if part not in NAMELESS)
        name = next(telling, "adapter")
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        return next(each for each in itertools.chain([name], numbered) if each not in self)
