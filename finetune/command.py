"""The command line shared by all commands on a recipe."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from adapters.command import CommandParser
from adapters.errors import command_line
from finetune.recipe.file import is_override, load_recipe

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe


def run_command(
    name: str,
    description: str,
    arguments: Sequence[str] | None,
    work: "Callable[[Recipe, argparse.Namespace], str]",
    example: str = "recipes/quickstart.yaml stage_1.steps=100",
    **options: dict[str, Any],
) -> None:
    """Parse a command line, load its recipe, and print what the work returns.

    A mistake is printed as a sentence, with exit status 2.

    Args:
        name: the command's module in :mod:`finetune`.
        description: what the command does, in a sentence.
        arguments: the command line; ``None``: the process's own.
        work: does the command's work on a checked recipe. It makes the slow imports, so that
            ``--help`` and mistakes are answered at once.
        example: the arguments of the example that ``--help`` shows.
        **options: further options and their settings, such as ``vram={"help": …}``.
    """
    parser = CommandParser(
        prog=f"python -m finetune.{name}",
        description=description,
        epilog=f"example:\n  python -m finetune.{name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example on one line
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the recipe's"
    )
    for option, settings in options.items():
        parser.add_argument(f"--{option.replace('_', '-')}", **settings)
    given = parser.parse_intermixed_args(arguments)
    for option, settings in options.items():
        if "nargs" in settings:
            move_overrides(given, option)
    with command_line():
        sys.stdout.write(work(load_recipe(given.recipe, given.overrides), given))


def move_overrides(given: argparse.Namespace, option: str) -> None:
    """Move overrides of the recipe from an option's values to the others.

    An option with several values takes all that follow it, as in ``--adapters A seed=1``.
    """
    values = getattr(given, option)
    taken = [value for value in values or () if is_override(value)]
    if taken:
        setattr(given, option, [value for value in values if value not in taken])
        given.overrides = [*given.overrides, *taken]
