"""Train a recipe many times with some of its fields varied, and report what each run scores.

python -m finetune.sweep RECIPE [key=value …] --over KEY=VALUE,VALUE [--over …]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapters.errors import UserError, command_line, say_loading
from finetune.sweeping.schema import read_sweep

if TYPE_CHECKING:
    from finetune.sweeping.schema import Sweep

OPTIONS = {
    "random": "the number of combinations to draw at random (default: train all)",
    "seed": "the seed of these draws (default: 0)",
    "seeds": "seeds to train every combination with, such as 0,1,2 (default: the recipe's)",
    "scales": "adapter scales to score every run at, such as 0.7,1 (default: 1)",
    "at-once": "the number of runs at a time on this machine (default: 1)",
    "name": "the sweep's folder under runs_dir (default: the recipe's name and -sweep)",
}
"""The options that a sweep's file has as keys too."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.sweep",
        description="Train a recipe many times with some of its fields varied, and report what each"
        " run scores. Run it again to continue.",
        epilog="example:\n  python -m finetune.sweep recipes/quickstart.yaml"
        " --over stage_1.adapter.rank=8,16 --scales 0.7,1",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example on one line
    )
    parser.add_argument("recipe", help="a recipe, or a sweep's own YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the recipe's"
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="a field to vary, with its values, or with a range {low: 1e-4, high: 1e-2, log: true};"
        " may be repeated",
    )
    parser.add_argument(
        "--across",
        action="append",
        default=[],
        metavar="NAME={VALUE: {KEY: …}, …}",
        help="something to train every combination on and to average scores across, such as"
        " subjects: its values by name, each with the fields that it sets; may be repeated",
    )
    for option, about in OPTIONS.items():
        parser.add_argument(f"--{option}", help=about)
    given = parser.parse_intermixed_args(arguments)
    names = [option.replace("-", "_") for option in OPTIONS]
    with command_line():
        sweep = read_sweep(
            given.recipe,
            overrides=given.overrides,
            over=given.over,
            across=given.across,
            options={name: getattr(given, name) for name in names},
        )
        run_sweep(sweep)


def run_sweep(sweep: "Sweep") -> None:
    """Train and score what is not yet, and print and write the report.

    Raises:
        UserError: before anything is trained, if the sweep has a mistake; at the end, if a run
            failed.
    """
    from finetune.sweeping.points import plan_points

    folder, points = plan_points(sweep)

    say_loading()
    from adapters.atomic import write_text
    from adapters.tables import format_facts
    from finetune.sweeping.outcomes import collect_outcomes, to_json
    from finetune.sweeping.report import write_page, write_table
    from finetune.sweeping.work import Result, alone_in, finish_points

    page, figures = folder / "report.html", folder / "results.json"

    def show(results: Sequence[Result]) -> None:
        outcomes = collect_outcomes(results, sweep.scales, len(points))
        write_text(figures, json.dumps(to_json(outcomes), indent=2) + "\n")
        write_text(page, write_page(f"{folder.name}: a sweep over {sweep.recipe}", outcomes))

    with alone_in(folder):
        results = finish_points(
            points, scales=sweep.scales, at_once=sweep.at_once, title=folder.name, show=show
        )
        show(results)
    outcomes = collect_outcomes(results, sweep.scales, len(points))
    facts = [
        ("* Pareto front", "no other has more of both fidelity and preservation"),
        ("Report", str(page)),
        ("Figures", str(figures)),
        ("Curves", f"tensorboard --logdir {folder}"),
    ]
    sys.stdout.write(f"{write_table(outcomes)}\n\n{format_facts(facts)}\n")
    if failed := outcomes.failures:
        raise UserError(
            f"{len(failed)} of {len(points)} runs failed, the first, {failed[0].point.name}, with:"
            f" {failed[0].failure}; run the sweep again once that is fixed."
        )


if __name__ == "__main__":
    main()
