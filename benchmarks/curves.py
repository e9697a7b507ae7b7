"""Make the pictures of docs/curves.md: runs that learn too little, enough and too much.

    python -m benchmarks.curves [--out docs/curves]

The quickstart's Stage I is the run that learns enough; the others differ from it in the settings of
:data:`RUNS` alone. What they draw and measure is read back from their TensorBoard events: a sheet
of pictures by step for each run, a chart of all curves, and a table of their last values. A run
that has ended is not trained again, so `make quickstart` may come first.
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

RECIPE = "recipes/quickstart.yaml"

SHORT = (
    "stage_2=null",
    "stage_1.steps=100",
    "stage_1.checkpoint_every=20",
    "validation.every=50",
    "validation.through_stage_2=never",
)
"""What the runs beside the quickstart change to end sooner."""

RUNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "too_little": ("name=too_little", *SHORT, "stage_1.optimizer.learning_rate=1e-4"),
        "enough": (),
        "too_much": (
            "name=too_much",
            *SHORT,
            "prior=null",
            "data.prompt=a {}",
            "stage_1.optimizer.learning_rate=3e-3",
            "stage_1.optimizer.schedule=constant",
        ),
    }
)
"""What each run changes of the quickstart."""

COLOURS = {"too_little": "#1f6fb4", "enough": "#2e8b3d", "too_much": "#c8442e"}

CURVES: Mapping[str, str] = MappingProxyType(
    {
        "fidelity/clip_i": "likeness to the subject",
        "fidelity/clip_t": "likeness to the prompts",
        "fidelity/sameness": "likeness among pictures",
        "forgetting/others_clip_t": "other prompts, likeness",
        "loss/fixed_noise": "loss at fixed noise",
    }
)
"""The curves that are drawn, and their titles."""

PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 250, 170, 34
COLUMNS = 2
"""The chart's columns: few, so that a phone shows it large enough."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/curves"), help="folder of pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    recipes = {name: load_recipe(RECIPE, overrides) for name, overrides in RUNS.items()}
    for overrides in RUNS.values():
        subprocess.run((sys.executable, "-m", "finetune.train", RECIPE, *overrides), check=True)
    events = {name: read_events(recipe) for name, recipe in recipes.items()}
    for name, found in events.items():
        lay_out(found, recipes[name]).save(options.out / f"{name}.png", optimize=True)
    curves = {
        name: {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in CURVES}
        for name, found in events.items()
    }
    (options.out / "curves.svg").write_text(draw_curves(curves))
    rows = [
        [name, f"{curves[name][next(iter(CURVES))][-1][0]}"]
        + [f"{curves[name][tag][-1][1]:.3f}" for tag in CURVES]
        for name in RUNS
    ]
    sys.stdout.write(format_table([["run", "step", *CURVES], *rows]) + "\n")


def read_events(recipe: Recipe) -> EventAccumulator:
    """Read what TensorBoard shows of a run's Stage I."""
    folder = Folders(recipe.folder).logs(STAGES[1])
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def lay_out(events: EventAccumulator, recipe: Recipe) -> Image.Image:
    """Lay out the pictures of a run: a row for each step, the subject's before the others."""
    rows = {
        "drawn/samples": recipe.validation.prompts,
        "drawn/samples_of_others": recipe.validation.other_prompts,
    }
    steps = sorted({each.step for each in events.Images("drawn/samples")})
    pictures = [
        [p for title, prompts in rows.items() for p in cut(events, title, step, len(prompts))]
        for step in steps
    ]
    return contact_sheet(
        pictures,
        row_captions=[f"step {step}" for step in steps],
        column_captions=[prompt for prompts in rows.values() for prompt in prompts],
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
