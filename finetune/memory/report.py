"""Plans, fitting settings and downloads, as text for the terminal."""

from collections.abc import Iterator, Sequence

from adapters.base.source import GUARDS
from adapters.cascade.memory_budget import GPU, parse_memory
from adapters.progress import format_seconds
from adapters.tables import format_table
from finetune.data.captions import TEXT_PARTS
from finetune.memory.fit import Plan, fit, plan
from finetune.memory.timing import estimate_seconds
from finetune.recipe.schema import OutputPrior, Recipe
from finetune.step.stages import STAGES
from unets.tally import GIB

LIBRARIES_BYTES = 0.6 * GIB
"""The main memory of a process that has only imported the trainer."""


def format_plan(plan: Plan, rate: float | None = None) -> str:
    """Write a plan: memory by part, the arithmetic of the steps, and memory and time by phase.

    Args:
        plan: the plan.
        rate: the rate of the card in FLOP/s; ``None``: times are left out.
    """
    phases = [("phase of the run", "GiB", "" if rate is None else "time"), *_phases(plan, rate)]
    own = f"; Python and its libraries take {_gib(LIBRARIES_BYTES)} GiB more"
    peak = f"At most {_gib(plan.peak.bytes)} GiB, in {plan.peak.name}"
    last = f"{peak}{own if plan.device.type == 'cpu' else ''}."
    return "\n".join([format_table(_stages(plan)), "", format_table(phases), "", last])


def _phases(plan: Plan, rate: float | None) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each phase, and one for all of them if their times are known."""
    for phase in plan.phases:
        time = ""
        if rate is not None and phase.work:
            time = format_seconds(estimate_seconds(phase.work, rate))
        yield phase.name, _gib(phase.bytes), time
    if rate is not None:
        whole = estimate_seconds(sum(phase.work for phase in plan.phases), rate)
        yield "in all, without loading", "", format_seconds(whole)


def _stages(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Yield the rows for each stage's training memory and arithmetic."""
    where, kept = ("GPU", ", kept by the CUDA graph")
    if plan.device.type == "cpu":
        where, kept = ("Main", "")
    yield (f"{where} memory in training, GiB", *(stage.name for stage in plan.choices))
    parts = [choice.footprint for choice in plan.choices.values()]
    yield ("frozen weights", *(_gib(part.weights) for part in parts))
    yield ("adapter and its gradient", *(_gib(part.adapter) for part in parts))
    yield ("optimizer's state", *(_gib(part.optimizer) for part in parts))
    yield ("copies of both in an update", *(_gib(part.copies) for part in parts))
    yield (f"activations{kept}", *(_gib(part.activations) for part in parts))
    rest = [part.reserved - part.resident - part.copies - part.activations for part in parts]
    yield ("workspaces and fragmentation", *(_gib(size) for size in rest))
    yield ("in all", *(_gib(part.reserved) for part in parts))

    own = [choice.training for choice in plan.choices.values()]
    flops = [part.flops * each.accumulation for part, each in zip(parts, own, strict=True)]
    yield ("base", *(each.precision_on(plan.device) for each in own))
    sizes = [each.batch_size * each.accumulation for each in own]
    yield ("pictures a step", *(f"{size:,}" for size in sizes))
    if isinstance(prior := plan.recipe.prior, OutputPrior):
        yield ("of these, preserved as output", *(f"{prior.count_in(size):,}" for size in sizes))
    yield ("TFLOP a step", *(f"{each / 1e12:.3g}" for each in flops))
    yield ("steps", *(f"{each.steps:,}" for each in own))
    totals = [each * training.steps for each, training in zip(flops, own, strict=True)]
    yield ("TFLOP in all", *(f"{total / 1e12:,.0f}" for total in totals))


def say_sizes_used(models: Sequence[str]) -> str:
    """Say which models' published sizes stand in for their files; empty if none do."""
    if not models:
        return ""
    return (
        f"The files of {' and '.join(models)} cannot be read here, so their published sizes are"
        " used: accept their licences on the hub and `hf auth login` before training."
    )


def format_fit(recipe: Recipe, vram: str, rate: float | None = None) -> str:
    """Write the settings that fit a card, and the plan of the fastest.

    Raises:
        UserError: if ``vram`` is not a size of memory, or as :func:`finetune.memory.fit.plan`.
    """
    budget = parse_memory(vram, "--vram")
    found = fit(recipe, budget)
    blocks = [f"Settings that fit {vram} ({_gib(budget)} GiB after the driver's share):"]
    for stage, choices in found.choices.items():
        rows = [(stage.name, "base", "checkpointing", "batch", "accumulation", "GiB", "time")]
        rows += [
            (
                "",
                choice.training.precision_on(GPU),
                "yes" if choice.training.gradient_checkpointing else "no",
                str(choice.training.batch_size),
                str(choice.training.accumulation),
                _gib(choice.footprint.reserved),
                f"{choice.work / choices[0].work:.2f}x",
            )
            for choice in choices
        ]
        blocks.append(format_table(rows) if choices else f"{stage.name}: nothing fits.")
    if found.plan is None:
        return "\n\n".join([*blocks, "No settings of this recipe fit: use a smaller base."])
    overrides = " ".join(found.overrides) or "(none: the recipe fits as it is)"
    # planned again, because a rehearsal's first step also builds tables that later steps reuse
    fastest = f"The fastest, as overrides:\n{overrides}"
    return "\n\n".join([*blocks, fastest, format_plan(plan(found.plan.recipe), rate)])


def format_downloads(recipe: Recipe) -> str:
    """List the files that a run will download, by component; empty if all are on this machine.

    Caches of encodings and class pictures are assumed to be empty. If the hub has never listed the
    files and cannot be reached, the text is one sentence that says so.

    Raises:
        UserError: if a base lacks weights that the run needs.
    """
    prior = recipe.class_pictures
    draws = bool(recipe.validation.prompts or (prior and not prior.folder))
    rows: list[tuple[str, ...]] = []
    everything: list[int] = []
    for stage in dict.fromkeys((STAGES[1], *recipe.trained)):
        files = recipe.source(stage).files
        if not files.is_listed:
            return f"The downloads for {files.name} cannot be listed offline."
        needed = {"unet": draws or stage in recipe.trained}
        needed |= dict.fromkeys(GUARDS, draws) | dict.fromkeys(TEXT_PARTS, stage is STAGES[1])
        for part in files.parts:
            if needed.get(part, True) and (sizes := files.absent_bytes(part)):
                rows.append((f"{stage.name}, {part}", f"{len(sizes):,}", _gib(sum(sizes))))
                everything += sizes
    if not rows:
        return ""
    last = ("in all", f"{len(everything):,}", _gib(sum(everything)))
    return format_table([("to download", "files", "GiB"), *rows, last])


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
