"""Sample the base and the fine-tuned cascade side by side, and score both with CLIP.

python -m finetune.compare RECIPE [key=value …]
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapters.errors import quiet_libraries
from finetune.command import run_command

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    about = "Draw the same prompts with the base and the fine-tuned cascade, and score both."
    run_command("compare", about, arguments, compare_and_judge)


def compare_and_judge(recipe: "Recipe", options: argparse.Namespace) -> str:
    """Compare, and judge the scores if the recipe expects some for the same data."""
    quiet_libraries()
    from finetune.evaluation.comparison import compare, judge

    text, report = compare(recipe)
    if recipe.evaluation is None or (expected := recipe.evaluation.expected) is None:
        return text
    sys.stdout.write(text)  # shown even if the judgement is an error
    if expected.data == recipe.data.source:
        return judge(report.variants["fine_tuned"], expected)
    return f"Not judged: the expected scores are for {expected.data}, not {recipe.data.source}.\n"


if __name__ == "__main__":
    main()
