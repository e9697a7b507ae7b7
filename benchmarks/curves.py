"""Make the pictures of docs/curves.md: runs that learn too little, enough and too much.

    python -m benchmarks.curves [--out docs/curves] [--steps 120]

Three runs of Stage I of the embedded cascade differ from the quickstart in the settings of
:data:`RUNS` alone. Each keeps what it draws and measures every 40 steps in its TensorBoard events,
which are read back: a sheet of pictures by step for each run, one chart of all curves, and a table
of their last values. A run that has ended is not trained again.
"""

import argparse
import io
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adapters.pictures.contact_sheet import CELL_PX, GAP_PX, contact_sheet
from adapters.tables import format_table
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.run.folders import Folders
from finetune.step.stages import STAGES

SUBJECT = ("a {} on a purple background", "a {} on a red striped background")
OTHERS = ("a cat face on a green background", "a pizza on a yellow dotted background")

EVERY = 40
"""Steps between validations."""

SHARED = (
    "stage_2=null",
    f"validation.prompts={list(SUBJECT)}",
    f"validation.other_prompts={list(OTHERS)}",
    f"validation.every={EVERY}",
    "validation.through_stage_2=always",
    "validation.held_out=2",
    "validation.sampling={stage_1: {steps: 12, guidance: 3.0},"
    " stage_2: {steps: 5, guidance: 1.0, noise_level: 100}}",
    "stage_1.checkpoint_every=20",
)
"""What all runs change of the quickstart."""

RUNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "enough": ("stage_1.optimizer.learning_rate=3e-3",),
        "too_much": (
            "prior=null",
            "data.prompt=a {}",
            "stage_1.optimizer.learning_rate=1e-2",
            "stage_1.optimizer.schedule=constant",
        ),
        "too_little": ("stage_1.optimizer.learning_rate=1e-4",),
    }
)
"""What each run changes besides."""

COLOURS = {"too_little": "#1f6fb4", "enough": "#2e8b3d", "too_much": "#c8442e"}

CURVES: Mapping[str, str] = MappingProxyType(
    {
        "fidelity/clip_i": "likeness to the subject",
        "fidelity/clip_t": "likeness to the prompts",
        "forgetting/others_clip_t": "other prompts, likeness to them",
        "loss/fixed_noise": "loss, training pictures",
        "loss/held_out": "loss, held-out pictures",
    }
)
"""The curves that are drawn, and their titles."""

PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 250, 170, 34
COLUMNS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/curves"), help="folder of pictures")
    parser.add_argument("--steps", type=int, default=120, help="steps of each run")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    events = {name: train(name, options.steps) for name in RUNS}
    for name, found in events.items():
        lay_out(found).save(options.out / f"{name}.png", optimize=True)
    curves = {
        name: {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in CURVES}
        for name, found in events.items()
    }
    (options.out / "curves.svg").write_text(draw_curves(curves))
    rows = [[name, *(f"{curves[name][tag][-1][1]:.3f}" for tag in CURVES)] for name in RUNS]
    sys.stdout.write(format_table([["run", *CURVES], *rows]) + "\n")


def train(name: str, steps: int) -> EventAccumulator:
    """Train a run unless it has ended, and return what TensorBoard shows of it."""
    settings = (f"name=curves-{name}", f"stage_1.steps={steps}", *SHARED, *RUNS[name])
    command = (sys.executable, "-m", "finetune.train", "recipes/quickstart.yaml", *settings)
    subprocess.run(command, check=True)
    recipe: Recipe = load_recipe("recipes/quickstart.yaml", settings)
    folder = Folders(recipe.folder).logs(STAGES[1])
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def lay_out(events: EventAccumulator) -> Image.Image:
    """Lay out the pictures of a run: a row for each step, the subject's before the others."""
    titles = ("drawn/through_stage_2", "drawn/through_stage_2_of_others")
    counts = (len(SUBJECT), len(OTHERS))
    rows = {
        step: [
            picture
            for title, count in zip(titles, counts, strict=True)
            for picture in cut(events, title, step, count)
        ]
        for step in sorted({each.step for each in events.Images(titles[0])})
    }
    prompts = [text.format("sks octopus") for text in SUBJECT] + list(OTHERS)
    return contact_sheet(
        list(rows.values()),
        row_captions=[f"step {step}" for step in rows],
        column_captions=prompts,
        cell_px=128,
    )


def cut(events: EventAccumulator, title: str, step: int, count: int) -> list[Image.Image]:
    """Cut the first pictures out of the sheet that a validation has logged."""
    newest = [each for each in events.Images(title) if each.step == step][-1]
    sheet = Image.open(io.BytesIO(newest.encoded_image_string))
    starts = [GAP_PX + place * (CELL_PX + GAP_PX) for place in range(count)]
    return [sheet.crop((x, GAP_PX, x + CELL_PX, GAP_PX + CELL_PX)) for x in starts]


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """Draw a panel for each curve with a line for each run, as SVG."""
    rows = -(-(len(CURVES) + 1) // COLUMNS)  # the last panel is the legend
    width, height = COLUMNS * PANEL_WIDTH, rows * PANEL_HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, (tag, title) in enumerate(CURVES.items()):
        lines += _panel(place, title, {name: curves[name][tag] for name in curves})
    lines += _legend(len(CURVES))
    return "\n".join([*lines, "</svg>\n"])


def _panel(place: int, title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    left = place % COLUMNS * PANEL_WIDTH + MARGIN + 6
    top = place // COLUMNS * PANEL_HEIGHT + MARGIN - 6
    right, bottom = left + PANEL_WIDTH - MARGIN - 24, top + PANEL_HEIGHT - 2 * MARGIN + 4
    values = [value for curve in curves.values() for _, value in curve]
    last = max(step for curve in curves.values() for step, _ in curve)
    low, high = min(values), max(values)

    def point(step: int, value: float) -> str:
        x = left + step / last * (right - left)
        y = bottom - (value - low) / ((high - low) or 1) * (bottom - top)
        return f"{x:.1f},{y:.1f}"

    lines = [
        f'<text x="{left}" y="{top - 10}" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="#888"/>',
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end" font-size="10">{high:.2f}</text>',
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end" font-size="10">{low:.2f}</text>',
        f'<text x="{left}" y="{bottom + 13}" font-size="10">0</text>',
        f'<text x="{right}" y="{bottom + 13}" text-anchor="end" font-size="10">{last} steps</text>',
    ]
    for name, curve in curves.items():
        points = " ".join(point(*each) for each in curve)
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>'
        )
    return lines


def _legend(place: int) -> list[str]:
    left, top = place % COLUMNS * PANEL_WIDTH + MARGIN, place // COLUMNS * PANEL_HEIGHT + 50
    return [
        f'<path d="M{left},{top + 24 * row}h24" stroke="{colour}" stroke-width="3"/>'
        f'<text x="{left + 32}" y="{top + 24 * row + 4}">{name.replace("_", " ")}</text>'
        for row, (name, colour) in enumerate(COLOURS.items())
    ]


if __name__ == "__main__":
    main()
