"""The frame of a command: shared options, errors as sentences, and one printed result."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from adapters.arguments import expand_home
from adapters.errors import UserError, command_line, hint, quiet_libraries, show_plainly

OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "--out": {
            "type": expand_home,
            "required": True,
            "metavar": "FOLDER",
            "help": "the new folder",
        },
        "--base": {
            "action": "append",
            "default": [],
            "metavar": "MODEL",
            "help": "the base: a folder or owner/name[@revision]; may be repeated, once per stage",
        },
        "--revision": {"help": "the base's hub revision"},
        "--variant": {"help": "the variant of the base's weights, such as fp16"},
        "--rank": {"type": int, "help": "the largest rank that a module may have"},
        "--error": {
            "type": float,
            "help": "the relative error that each module may have, such as 0.1",
        },
        "--stage": {
            "type": int,
            "choices": (1, 2),
            "help": "the stage of adapters that do not state theirs",
        },
        "--device": {"default": "cpu", "help": "the device, such as cuda (default: cpu)"},
        "--json": {"action": "store_true", "help": "print everything as a JSON list"},
        "--clean-caption": {
            "action": argparse.BooleanOptionalAction,
            "help": "clean prompts as IF's pipelines do, which drops <sks>, j0hn, #3 and all"
            " Chinese (default: yes)",
        },
    }
)
"""Options that several commands share."""


class CommandParser(argparse.ArgumentParser):
    """A parser that says where a missing argument has gone: to an option with several values."""

    _given: Sequence[str] = ()
    """The arguments, for messages."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; intermixed arguments in two passes, the first with all."""
        self._given = self._given or (sys.argv[1:] if args is None else list(args))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print a mistake as a sentence, and exit with status 2."""
        greedy = [
            option
            for action in self._actions
            for option in action.option_strings
            if action.nargs in ("*", "+") and option in self._given
        ]
        if "arguments are required" in message and greedy:
            message += f" ({greedy[0]} takes all values that follow it: write the others before it)"
        # as a UserError, because an argument may be long
        sentence = UserError(f"{message}{self._hint(message)}; see {self.prog} --help.")
        self.exit(2, f"error: {sentence}\n")

    def _hint(self, message: str) -> str:
        """Hint at the option closest to one that there is not."""
        _, mark, unknown = message.partition("unrecognized arguments: ")
        options = [name for action in self._actions for name in action.option_strings]
        closest = hint(unknown.partition(" ")[0], options) if mark else ""
        return f" ({closest})" if closest else ""


def command_parser(
    name: str, description: str, example: str, *shared: str, **settings: Any
) -> argparse.ArgumentParser:
    """Begin the parser of a command in :mod:`adapters`, with an example and shared options.

    ``shared`` are names of :data:`OPTIONS`, and ``settings`` go to ``ArgumentParser``.
    """
    command = f"python -m adapters.{name}"
    parser = CommandParser(
        prog=command,
        description=description,
        epilog=f"example:\n  {command} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example on one line
        **settings,
    )
    for option in shared:
        parser.add_argument(option, **OPTIONS[option])
    return parser


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    work: Callable[[argparse.Namespace], object],
) -> None:
    """Parse a command line and print what the work returns; mistakes exit with status 2.

    The work imports slow modules in its own body, so that ``--help`` answers at once.
    """
    with command_line():
        options = parser.parse_args(arguments)
        quiet_libraries()
        result = work(options)
    sys.stdout.write(f"{show_plainly(str(result))}\n")


def format_report(
    found: Sequence[Mapping[str, Any]],
    as_text: Callable[[Mapping[str, Any]], str],
    *,
    as_json: bool,
) -> str:
    """Format a command's findings as JSON for programs, or by ``as_text`` for people."""
    return json.dumps(found, indent=2) if as_json else "\n\n".join(map(as_text, found))
