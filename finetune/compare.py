"""Draw the base and the fine-tuned cascade side by side, and score both with CLIP.

python -m finetune.compare RECIPE [key=value …]
"""

import argparse
import sys
from collections.abc import Sequence

from adapters.errors import command_line
from finetune.recipe.file import load_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; libraries are loaded once the recipe has no mistakes."""
    parser = argparse.ArgumentParser(
        prog="finetune.compare",
        description="Draw the base and the fine-tuned cascade side by side, and score both.",
    )
    parser.add_argument("recipe", help="the recipe of a finished run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    with command_line():
        recipe = load_recipe(options.recipe, options.overrides)
        from finetune.evaluation.comparison import compare, judge

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
