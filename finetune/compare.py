"""The base beside the fine-tuned cascade: one picture to look at, and its CLIP scores.

python -m finetune.compare RECIPE [key=value …]
"""

import argparse
import sys
from collections.abc import Sequence

from adapters.errors import command_line
from finetune.evaluation.comparison import compare, judge
from finetune.recipe.file import load_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="finetune.compare", description="The base beside the fine-tuned cascade."
    )
    parser.add_argument("recipe", help="the recipe of a finished run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    with command_line():
        recipe = load_recipe(options.recipe, options.overrides)
        text, scores = compare(recipe)
        sys.stdout.write(text)
        expected = recipe.comparison and recipe.comparison.expected
        if expected and expected.data == recipe.data.source:
            sys.stdout.write(judge(scores, expected))
        elif expected:
            sys.stdout.write(
                f"Not judged: the expected scores are of {expected.data}, not of"
                f" {recipe.data.source}.\n"
            )


if __name__ == "__main__":
    main()
