"""Measure what a run has learnt, copied and forgotten, with pictures to look at.

python -m finetune.evaluate RECIPE [key=value …] [--adapters FOLDER[=SCALE] …]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import UserError, quiet_libraries
from finetune.command import run_command

if TYPE_CHECKING:
    from adapters.arguments import Scale
    from finetune.recipe.schema import Recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(
        "evaluate",
        "Draw the recipe's evaluation prompts with the base and with adapters, and score both.",
        arguments,
        evaluate_and_save,
        "runs/dog/recipe.yaml --adapters runs/dog=0.8 runs/style --stages apart",
        adapters={
            "nargs": "*",
            "action": "extend",
            "metavar": "FOLDER[=SCALE]",
            "help": "adapters to evaluate, together (default: those of the recipe's run; without a"
            " folder: none)",
        },
        stages={
            "choices": ("together", "apart"),
            "default": "together",
            "help": "apart: evaluate each stage's adapters alone as well (default: together)",
        },
        reference={
            "metavar": "FOLDER",
            "help": "pictures to compute the Fréchet distance to (default: not computed)",
        },
    )


def evaluate_and_save(recipe: "Recipe", options: argparse.Namespace) -> str:
    """Evaluate, and write the report into the run's folder; return scores and verdict as text."""
    quiet_libraries()
    from adapters.tables import fill_lines, format_facts
    from finetune.evaluation.drawing import BASE, FINE_TUNED
    from finetune.evaluation.measurement import evaluate
    from finetune.evaluation.report import SCORES, check_folder
    from finetune.evaluation.verdict import write_verdict
    from finetune.run.folders import Folders

    folder = Folders(recipe.folder).evaluation
    check_folder(folder)
    report = evaluate(
        recipe,
        read_adapters(options.adapters),
        apart=options.stages == "apart",
        reference=options.reference,
    )
    page = report.save(folder)
    facts = [("Report", str(page)), ("Scores", str(folder / SCORES))]
    if options.stages == "apart" and not set(report.variants) - {BASE, FINE_TUNED}:
        facts.append(("Stages", "not apart, as no more than one of them has adapters"))
    remarks = map(fill_lines, (write_verdict(report), report.explain_intervals()))
    return "\n\n".join([report.table(), *remarks, format_facts(facts)]) + "\n"


def read_adapters(arguments: Sequence[str] | None) -> "dict[str, Scale] | None":
    """Read adapters and their scales; ``None``: the run's own.

    Raises:
        UserError: if a scale cannot be read, or adapters are given twice.
    """
    from adapters.arguments import parse_scaled

    if arguments is None:
        return None
    adapters, places = dict[str, "Scale"](), set[Path]()
    for name, scale in map(parse_scaled, arguments):
        place = Path(name).resolve()
        if place in places:
            raise UserError(f"--adapters must name different adapters (got {name} twice).")
        places.add(place)
        adapters[name] = 1.0 if scale is None else scale
    return adapters


if __name__ == "__main__":
    main()
