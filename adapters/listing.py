"""The loaded adapters of a cascade by name: how much of each there is, and names for new ones."""

import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path

from adapters.errors import UserError
from adapters.merging import StageAdapter

NAMELESS = ("adapters", "stage_1", "stage_2", "adapter_model", "pytorch_lora_weights", "..")
"""Names of folders and files that say nothing of what an adapter is."""


class Listing(dict[str, dict[int, float]]):
    """The scale of each adapter in each of its stages, by name; its text is a table of them.

    ``Cascade.set_adapters`` takes it.
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
        rows = [("adapter", "stage", "scale", "kind", "from"), *self._rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def known(self, name: str) -> str:
        """A name, once it is that of a loaded adapter.

        Raises:
            UserError: where it is not, naming the closest.
        """
        if name in self:
            return name
        if not self:
            raise UserError(f"No adapter is called {name!r}, as none is loaded; add it first.")
        (closest,) = difflib.get_close_matches(name, self, n=1, cutoff=0)
        raise UserError(
            f"No adapter is called {name!r}; did you mean {closest!r}? Loaded: {', '.join(self)}."
        )

    def free(self, name: str) -> str:
        """A name, once no loaded adapter has it.

        Raises:
            UserError: where one has.
        """
        if name in self:
            raise UserError(f"An adapter called {name!r} is loaded already; choose another name.")
        return name

    def free_name(self, folder: Path) -> str:
        """A free name after a folder or file, with a number where another adapter has it."""
        parts = [part.removesuffix(".safetensors") for part in folder.absolute().parts[1:]]
        telling = (part for part in reversed(parts) if part not in NAMELESS)
        name = next(telling, "adapter")
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        return next(each for each in itertools.chain([name], numbered) if each not in self)
