"""Notes on data left out, ignored or changed, each kind of which is said once."""

from collections.abc import Iterable

from adapters.errors import listed, print_once

NAMED = 3
"""The number of files that a sentence names."""


class Notes:
    """Sentences about pictures and captions, each with those that it is about."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, beginning: str, name: object) -> None:
        """Add a file to those that a sentence ends with."""
        self._names.setdefault(beginning, []).append(str(name))

    def add_all(self, beginning: str, names: Iterable[object]) -> None:
        """Add several files to those that a sentence ends with."""
        for name in names:
            self.add(beginning, name)

    @property
    def sentences(self) -> list[str]:
        """The sentences."""
        return [f"{words} {listed(names, NAMED)}." for words, names in self._names.items()]

    def say(self) -> None:
        """Print the sentences, each once, in the first process only."""
        for sentence in self.sentences:
            print_once(sentence)
