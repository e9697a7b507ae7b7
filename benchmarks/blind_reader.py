"""Ask a reader who does not know the answer which object the runs of a sweep have learnt.

    python -m benchmarks.blind_reader runs/quickstart_settings --out blind

For each run a sheet: above, pictures that its adapters have drawn; below, five objects in a random
order, of which one is the run's subject and four are others of the embedded world. The sheets are
numbered in a random order; `answers.json`, which the reader must not see, has the letter of each.
Show someone the sheets one by one, and compare.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adapters.pictures.contact_sheet import contact_sheet
from models.picture_scores import render_true
from models.truth_of_sweeps import Run, read_runs
from models.world import THINGS, caption, parse_caption

LETTERS = "ABCDE"
"""The names of the objects to choose from."""

SPRITES = Path("models/sprites")
"""The objects that can be drawn anywhere: the subjects and some that the base knows."""


def lay_out(run: Run, chance: np.random.Generator) -> tuple[object, str]:
    """Lay out a run's sheet.

    Returns:
        The sheet, and the letter of the subject.
    """
    from finetune.evaluation.drawing import list_shots
    from finetune.sweeping.scoring import pictures_folder, read_drawn

    shots = list_shots(run.settings)
    kept = read_drawn(pictures_folder(run.recipe, run.scale), len(shots))
    if kept is None:
        raise SystemExit(f"{run.recipe.folder}: its pictures are missing; run the sweep again.")
    of_subject = [index for index, shot in enumerate(shots) if shot.group == "subject"]
    drawn = [kept[0][index] for index in of_subject[: len(LETTERS)]]
    subject = THINGS[parse_caption(run.settings.subject)[0]]
    names = [path.stem.replace("_", " ") for path in sorted(SPRITES.glob("*.png"))]
    things = [parse_caption(name)[0] for name in names if name != subject.name]
    options = [*chance.choice(things, len(LETTERS) - 1, replace=False), THINGS.index(subject)]
    chance.shuffle(options)
    objects = [render_true([caption(int(thing), 0)], 1, 0)[0] for thing in options]
    sheet = contact_sheet(
        [drawn, objects], row_captions=["drawn", "which one?"], column_captions=list(LETTERS)
    )
    return sheet, LETTERS[options.index(THINGS.index(subject))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--combination", help="only the runs of this one, such as 'setting a'")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    given = parser.parse_args(arguments)
    runs = [
        run for run in read_runs(given.sweep) if run.combination.startswith(given.combination or "")
    ]
    chance = np.random.default_rng(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    answers = {}
    for number, index in enumerate(chance.permutation(len(runs)), 1):
        sheet, answers[f"{number:02d}.png"] = lay_out(runs[index], chance)
        sheet.save(given.out / f"{number:02d}.png")
    (given.out / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")


if __name__ == "__main__":
    main()
