"""Estimate the memory that a run takes of a GPU, and the fastest settings that fit a card.

python -m finetune.plan RECIPE [key=value …] [--vram 8GB]
"""

import argparse
import sys
from collections.abc import Sequence

from adapters.errors import command_line


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="finetune.plan",
        description="Estimate the memory that a recipe takes of a GPU; this machine needs none.",
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/dreambooth_6gb.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. stage_1.batch_size=2"
    )
    parser.add_argument("--vram", help="find the fastest settings that fit a card, such as 8GB")
    options = parser.parse_intermixed_args(arguments)
    with command_line():
        from finetune.recipe.file import load_recipe

        recipe = load_recipe(options.recipe, options.overrides)

        import torch

        from finetune.memory.fit import plan
        from finetune.memory.report import format_downloads, format_fit, format_plan

        about = ""
        if not torch.cuda.is_available():
            about = "For a GPU, where the precision auto is bf16; this machine has none."
        vram = options.vram
        text = format_plan(plan(recipe)) if vram is None else format_fit(recipe, vram)
        blocks = filter(None, (about, text, format_downloads(recipe)))
        sys.stdout.write("\n\n".join(blocks) + "\n")


if __name__ == "__main__":
    main()
