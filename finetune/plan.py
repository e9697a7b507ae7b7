"""What a run will take of a GPU, and the fastest settings that fit one: before it starts.

python -m finetune.plan RECIPE [key=value …] [--vram 8GB]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from adapters.base.guards import GUARDS
from adapters.cascade.memory_budget import memory_bytes
from adapters.errors import command_line
from finetune.data.captions import TEXT_PARTS
from finetune.memory.fit import Plan, fit, plan
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.step.stages import STAGES
from unets.tally import GIB

Row = tuple[str, ...]

LIBRARIES_BYTES = 0.6 * GIB
"""The main memory of a process that has imported the trainer, and done nothing yet."""


def _table(rows: Sequence[Row]) -> list[str]:
    """Rows as text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def plan_text(plan: Plan) -> str:
    """A plan, as a person reads it."""
    return "\n".join([*_table([*_parts(plan), *_arithmetic(plan)]), "", *_phases(plan)])


def _parts(plan: Plan) -> Iterator[Row]:
    """Memory in training by part and stage."""
    where, kept = ("Main", "") if _on_cpu(plan) else ("GPU", ", kept by the CUDA graph")
    yield (f"{where} memory in training, GiB", *(stage.name for stage in plan.footprints))
    parts = plan.footprints.values()
    yield ("frozen weights", *(_gib(part.weights) for part in parts))
    yield ("adapter and its gradient", *(_gib(part.adapter) for part in parts))
    yield ("optimizer's state", *(_gib(part.optimizer) for part in parts))
    yield (f"activations{kept}", *(_gib(part.activations) for part in parts))
    rest = [part.reserved - part.resident - part.activations for part in parts]
    yield ("workspaces and fragmentation", *(_gib(size) for size in rest))
    yield ("in all", *(_gib(part.reserved) for part in parts))


def _arithmetic(plan: Plan) -> Iterator[Row]:
    """The arithmetic of the steps."""
    own = [plan.recipe.training(stage) for stage in plan.footprints]
    flops = [
        part.flops * training.accumulation
        for part, training in zip(plan.footprints.values(), own, strict=True)
    ]
    yield ("base", *(training.precision_on(plan.device) for training in own))
    yield ("pictures a step", *(f"{each.batch_size * each.accumulation:,}" for each in own))
    yield ("TFLOP a step", *(f"{each / 1e12:.3g}" for each in flops))
    yield ("steps", *(f"{training.steps:,}" for training in own))
    totals = [each * training.steps for each, training in zip(flops, own, strict=True)]
    yield ("TFLOP in all", *(f"{total / 1e12:,.0f}" for total in totals))


def _phases(plan: Plan) -> list[str]:
    """What the run takes, phase by phase."""
    rows = [("phase of the run", "GiB"), *((p.name, _gib(p.bytes)) for p in plan.phases)]
    peak = plan.peak
    own = f"; Python and its libraries take {_gib(LIBRARIES_BYTES)} GiB more"
    last = f"At most {_gib(peak.bytes)} GiB, in {peak.name}{own if _on_cpu(plan) else ''}."
    return [*_table(rows), "", last]


def downloads_text(recipe: Recipe) -> str:
    """The files that a run will download, by component, as a person reads it.

    Caches of encodings and class pictures are taken to be empty. Nothing where all files are here;
    one sentence where the hub has never listed them and cannot be asked.

    Raises:
        UserError: where a base lacks weights that the run needs.
    """
    draws = bool(recipe.validation.prompts or (recipe.prior and not recipe.prior.folder))
    rows: list[Row] = []
    everything: list[int] = []
    for stage in dict.fromkeys((STAGES[1], *recipe.trained)):
        source = recipe.source(stage)
        if not source.files.is_listed:
            return f"What is to be downloaded of {source.name} cannot be told offline.\n"
        needed = {"unet": draws or stage in recipe.trained}
        needed |= dict.fromkeys(GUARDS, draws) | dict.fromkeys(TEXT_PARTS, stage is STAGES[1])
        for part in source.parts:
            if needed.get(part, True) and (sizes := source.absent_bytes(part)):
                rows.append((f"{stage.name}, {part}", f"{len(sizes):,}", _gib(sum(sizes))))
                everything += sizes
    if not rows:
        return ""
    last = ("in all", f"{len(everything):,}", _gib(sum(everything)))
    return "\n".join([*_table([("to download", "files", "GiB"), *rows, last]), ""])


def _on_cpu(plan: Plan) -> bool:
    return plan.device.type == "cpu"


def fit_text(recipe: Recipe, vram: str) -> str:
    """What fits a card, for people."""
    budget = memory_bytes(vram, "--vram")
    found = fit(recipe, budget)
    lines = [f"On a card of {vram}, {_gib(budget)} GiB beside the driver's own:", ""]
    for stage, choices in found.choices.items():
        rows = [(stage.name, "base", "checkpointing", "batch", "accumulation", "GiB", "time")]
        rows += [
            (
                "",
                choice.settings.precision,
                "yes" if choice.settings.gradient_checkpointing else "no",
                str(choice.settings.batch_size),
                str(choice.settings.accumulation),
                _gib(choice.footprint.reserved),
                f"{choice.work / choices[0].work:.2f}x",
            )
            for choice in choices
        ]
        lines += [*_table(rows), ""] if choices else [f"{stage.name}: nothing fits.", ""]
    if found.recipe is None:
        return "\n".join([*lines, "No settings of this recipe fit: take a smaller base.", ""])
    overrides = " ".join(found.overrides) or "(none: the recipe fits as it is)"
    return "\n".join(
        [*lines, "The fastest, as overrides:", overrides, "", plan_text(plan(found.recipe)), ""]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="finetune.plan", description="What a recipe will take of a GPU; none is needed here."
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/dreambooth_6gb.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. stage_1.batch_size=2"
    )
    parser.add_argument("--vram", help="find the fastest settings that fit a card, such as 8GB")
    options = parser.parse_intermixed_args(arguments)
    with command_line():
        recipe = load_recipe(options.recipe, options.overrides)
        plain = options.vram is None
        text = f"{plan_text(plan(recipe))}\n" if plain else fit_text(recipe, options.vram)
        downloads = downloads_text(recipe)
        sys.stdout.write("\n".join(filter(None, (text, downloads))))


if __name__ == "__main__":
    main()
