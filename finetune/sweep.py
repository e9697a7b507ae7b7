"""Train a recipe many times with some of its fields varied, and report what each run scores.

python -m finetune.sweep RECIPE [key=value …] --over KEY=VALUE,VALUE [--over …]
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from adapters.errors import UserError, command_line, say_loading
from finetune.sweeping.schema import read_sweep

if TYPE_CHECKING:
    from finetune.sweeping.schema import Sweep

OPTIONS = {
    "random": "the number of combinations to draw at random (default: train all)",
    "seed": "the seed of these draws (default: 0)",
    "seeds": "seeds to train every combination with, such as 0,1,2 (default: the recipe's)",
    "scales": "adapter scales to score every run at, such as 0.7,1 (default: 1)",
    "against": "the combination to compare with, such as rank-8, or rank-8=0.7 at another scale"
    " (default: the first)",
    "keep-others": "the least share of the base's CLIP-T of other prompts that a recommendation"
    " keeps (default: 0.9)",
    "at-once": "the number of runs at a time on this machine (default: 1)",
    "name": "the sweep's folder under runs_dir (default: the recipe's name and -sweep)",
}
"""The options that a sweep's file has as keys too."""

REPORTS = ("report.html", "report.md", "results.json")
"""The files of a sweep's report, in its folder."""

INTERRUPTED = 130
"""The exit status of an interrupted command, as shells have it."""


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
        given_line = sys.argv[1:] if arguments is None else arguments
        run_sweep(sweep, shlex.join(["python", "-m", "finetune.sweep", *given_line]))


def run_sweep(sweep: "Sweep", command: str) -> None:
    """Train and score what is not yet, and print and write the report.

    Args:
        sweep: the sweep.
        command: the command line, for the report.

    Raises:
        UserError: before anything is trained, if the sweep has a mistake; at the end, if a run
            failed.
        SystemExit: if it is interrupted, after saying what is kept.
    """
    from finetune.sweeping.points import find_reference, plan_points

    folder, points = plan_points(sweep)
    reference = find_reference(sweep, points)

    say_loading()
    from adapters.atomic import write_text
    from adapters.tables import format_facts
    from finetune.sweeping.outcomes import Outcomes, collect_outcomes
    from finetune.sweeping.report import write_markdown, write_page, write_text_report
    from finetune.sweeping.results import to_json
    from finetune.sweeping.work import Result, alone_in, finish_points

    title = f"{folder.name}: a sweep over {sweep.recipe}"
    page, tables, figures = (folder / name for name in REPORTS)
    finished: list[Result] = []

    def show(results: Sequence[Result]) -> Outcomes:
        finished[:] = results
        outcomes = collect_outcomes(
            results, sweep.scales, len(points), reference, sweep.keep_others
        )
        write_text(figures, json.dumps(to_json(outcomes), indent=2) + "\n")
        write_text(page, write_page(title, outcomes))
        write_text(tables, write_markdown(title, command, outcomes))
        return outcomes

    try:
        with alone_in(folder):
            results = finish_points(
                points, scales=sweep.scales, at_once=sweep.at_once, title=folder.name, show=show
            )
            outcomes = show(results)
    except KeyboardInterrupt:
        tqdm.write(
            f"interrupted: {len(finished)} of {len(points)} runs are done; they and the last"
            f" checkpoints of others are kept in {folder}. Run the same command again to continue.",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None
    facts = [
        ("* Pareto front", "no other has more of both fidelity and preservation"),
        ("Report", str(page)),
        ("Tables", str(tables)),
        ("Figures", str(figures)),
        ("Curves", f"tensorboard --logdir {folder}"),
    ]
    sys.stdout.write(f"{write_text_report(outcomes)}\n\n{format_facts(facts)}\n")
    if failed := outcomes.failures:
        raise UserError(
            f"{len(failed)} of {len(points)} runs failed, the first, {failed[0].point.name}, with:"
            f" {failed[0].failure}; run the sweep again once that is fixed."
        )


if __name__ == "__main__":
    main()
