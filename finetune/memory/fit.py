"""The memory of a whole run, phase by phase, and the fastest settings that fit a card."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import isqrt
from typing import Any

import torch

from adapters.base.estimates import text_encoder_bytes
from adapters.base.source import Source
from adapters.cascade.memory_budget import AT_ONCE, GPU
from adapters.errors import UserError
from adapters.progress import Bar
from adapters.weights.kinds import AdapterSpec
from finetune.memory.footprint import Footprint, Rehearsal
from finetune.recipe.schema import Prior, Recipe, Text, Training
from finetune.step.stages import STAGES, Stage
from unets.tally import GIB, reserved

BASES = ("bf16", "nf4")
"""The precisions tried for a base: the fastest, and the smallest."""


@dataclass(frozen=True)
class Choice:
    """A stage's section of a recipe, with the memory and time that it takes."""

    training: Training
    rehearsal: Rehearsal
    footprint: Footprint

    @property
    def work(self) -> float:
        """A relative measure of an optimizer step's time."""
        return self.training.accumulation * self.footprint.work


@dataclass(frozen=True)
class Phase:
    """A part of a run, and the bytes that PyTorch reserves on the GPU during it."""

    name: str
    bytes: int
    work: float = 0.0
    """A relative measure of its time in the whole run, as :func:`finetune.memory.timing.work_of`;
    0: not known."""


@dataclass(frozen=True)
class Plan:
    """The memory that a recipe takes on a device."""

    recipe: Recipe
    device: torch.device
    choices: Mapping[Stage, Choice]
    """The choice for each trained stage."""
    phases: tuple[Phase, ...]
    """The phases in the order of the run."""

    @property
    def peak(self) -> Phase:
        """The phase that takes the most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)


def plan(recipe: Recipe, device: torch.device = GPU) -> Plan:
    """Estimate the memory that a recipe takes on a device, which this machine need not have.

    Args:
        recipe: the run; its caches are assumed to be empty.
        device: any kind of GPU, or a CPU.

    Raises:
        UserError: if a base's configuration is missing, or a target matches nothing.
    """
    sources, choices = _sources(recipe), {}
    for stage in recipe.trained:
        training = recipe.training(stage)
        rehearsal = Rehearsal.of(stage, training, sources, device, recipe.prior)
        choices[stage] = Choice(training, rehearsal, rehearsal.footprint())
    return Plan(recipe, device, choices, tuple(_phases(recipe, device, choices)))


def _sources(recipe: Recipe) -> dict[int, Source]:
    """Return the bases of the trained stages and of those that draw for them, by number."""
    drawing = {STAGES[2]} if recipe.shows_stage_2 else set()
    return {s.number: recipe.source(s) for s in {STAGES[1], *drawing, *recipe.trained}}


def _phases(
    recipe: Recipe, device: torch.device, choices: Mapping[Stage, Choice]
) -> Iterator[Phase]:
    """Yield the phases of a run; validation's memory adds to what training keeps."""
    prior, validation = recipe.class_pictures, recipe.validation
    if recipe.text.device == "auto":
        size = _text_bytes(recipe.text, recipe.source(STAGES[1]), device)
        yield Phase("encoding captions", size)
    rehearsals = {stage: choice.rehearsal for stage, choice in choices.items()}
    below, above = STAGES[1], STAGES[2]
    draws_prior = prior is not None and not prior.folder
    rows = [row for row in (validation.prompts, validation.other_prompts) if row]
    needed = {below: bool(rows) or draws_prior, above: recipe.shows_stage_2}
    # an untrained stage runs in the precision of the trained one; that stage's adapter may fit none
    # of its modules, while the default one fits any and takes next to nothing
    other = next(iter(choices.values())).training
    untrained = other.model_copy(update={"adapter": AdapterSpec()})
    drawing = {
        stage: rehearsals.get(stage) or Rehearsal.of(stage, untrained, _sources(recipe), device)
        for stage in (below, above)
        if stage in rehearsals or needed[stage]
    }
    if prior is not None and draws_prior:
        at_once = min(prior.count, prior.sampling.batch_size)
        samplers = [drawing[stage] for stage in {below, *rehearsals}]
        weights = sum(each.weights_bytes for each in samplers)
        most = max(each.drawing_bytes(at_once) for each in samplers)
        work = sum(
            drawing[stage].drawing_work(prior.count, at_once, prior.sampling.steps(stage.number))
            for stage in {below, *rehearsals}
        )
        yield Phase("class pictures", reserved(weights + most), work)
    for stage, choice in choices.items():
        resident = choice.footprint.resident
        at_once = min(max(map(len, rows), default=0), validation.sampling.batch_size)
        count = sum(map(len, rows))
        if at_once and stage.super_resolution:
            name = f"{stage.name}, {below.name}'s samples"
            work = drawing[below].drawing_work(count, at_once, validation.sampling.steps(1))
            yield Phase(name, _bytes_beside(resident, drawing[below], at_once), work)
        work = choice.work * choice.training.steps
        yield Phase(f"{stage.name}, training", choice.footprint.reserved, work)
        if at_once:
            most = choice.rehearsal.drawing_bytes(at_once)
            times = 1 + -(-choice.training.steps // validation.every)  # the first is of the base
            steps = validation.sampling.steps(stage.number)
            work = times * choice.rehearsal.drawing_work(count, at_once, steps)
            yield Phase(f"{stage.name}, validation", reserved(resident + most), work)
        if not stage.super_resolution and needed[above]:
            name = f"{stage.name}, samples through {above.name}"
            work = drawing[above].drawing_work(count, at_once, validation.sampling.steps(2))
            work *= times if validation.through_stage_2 == "always" else 1
            yield Phase(name, _bytes_beside(resident, drawing[above], at_once), work)


def _bytes_beside(resident: int, other: Rehearsal, at_once: int) -> int:
    """Estimate the bytes reserved while another stage is loaded beside one in training, and draws.

    Args:
        resident: the bytes of the one in training.
        other: the other stage.
        at_once: the number of pictures drawn at once.
    """
    return reserved(resident + other.weights_bytes + other.drawing_bytes(at_once))


def _text_bytes(text: Text, source: Source, device: torch.device) -> int:
    """Estimate the bytes that PyTorch reserves while captions are encoded."""
    precision = text.precision_on(device)
    return reserved(sum(text_encoder_bytes(source, precision)))


def fitting_settings(
    stage: Stage,
    training: Training,
    sources: Mapping[int, Source],
    budget: float,
    prior: Prior | None = None,
) -> list[Choice]:
    """Find settings that fit a budget and train a stage as its own do, the fastest first.

    All keep the recipe's number of pictures per step: smaller batches are accumulated. The base is
    tried in bf16 and in NF4, without and with gradient checkpointing, each with the largest batch
    that fits.

    Args:
        stage: the stage.
        training: the stage's section of the recipe.
        sources: see :meth:`Rehearsal.of`.
        budget: the bytes that PyTorch may reserve.
        prior: the recipe's prior preservation.
    """
    pictures = training.batch_size * training.accumulation
    sizes, found = list_divisors(pictures), []
    tried = [(precision, checkpointed) for precision in BASES for checkpointed in (False, True)]
    for precision, checkpointed in Bar(tried, f"Settings of {stage.name}", leave=False, delay=2):
        fields: dict[str, Any] = {"gradient_checkpointing": checkpointed}
        if training.precision_on(GPU) != precision:  # else keep "auto"
            fields["precision"] = precision
        rehearsal = Rehearsal.of(stage, training.model_copy(update=fields), sources, GPU, prior)
        footprints = cache(partial(_divide, rehearsal, pictures))
        place = bisect_left(sizes, True, key=lambda size: footprints(size).reserved <= budget)
        if place < len(sizes):
            size = sizes[place]
            fields |= {"batch_size": size, "accumulation": pictures // size}
            chosen = training.model_copy(update=fields)
            found.append(Choice(chosen, rehearsal, footprints(size)))
    return sorted(found, key=lambda choice: choice.work)


def _divide(rehearsal: Rehearsal, pictures: int, size: int) -> Footprint:
    """Estimate the footprint of a step of some pictures in batches of a size."""
    return rehearsal.footprint(size, pictures // size)


def list_divisors(number: int) -> list[int]:
    """List the divisors of a number, descending.

    Example:
        >>> list_divisors(12)
        [12, 6, 4, 3, 2, 1]
    """
    small = [each for each in range(1, isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)}, reverse=True)


@dataclass(frozen=True)
class Fit:
    """The fastest settings of a recipe that fit a budget."""

    choices: Mapping[Stage, Sequence[Choice]]
    """Settings that fit, by stage, the fastest first; empty for a stage that nothing fits."""
    plan: Plan | None = None
    """The plan of the recipe with the fastest settings; ``None``: nothing fits."""
    overrides: tuple[str, ...] = ()
    """The plan's differences from the given recipe, in the form of the command line."""


def fit(recipe: Recipe, budget: float) -> Fit:
    """Find a recipe's fastest settings with which all phases fit a budget in bytes."""
    sources = _sources(recipe)
    choices = {
        stage: fitting_settings(stage, recipe.training(stage), sources, budget, recipe.prior)
        for stage in recipe.trained
    }
    if not all(choices.values()):
        return Fit(choices)
    text = _fit_text(recipe.text, sources[1], budget)
    for rank in range(max(map(len, choices.values()))):  # each stage's fastest, then its next
        chosen = {stage: found[min(rank, len(found) - 1)] for stage, found in choices.items()}
        sections = {stage.name: choice.training for stage, choice in chosen.items()}
        settled = recipe.model_copy(update={"text": text, **sections})
        for at_once in AT_ONCE:
            changed = _sample_at_once(settled, at_once)
            planned = Plan(changed, GPU, chosen, tuple(_phases(changed, GPU, chosen)))
            if planned.peak.bytes <= budget:
                trees = (each.model_dump(mode="json") for each in (recipe, changed))
                return Fit(choices, planned, tuple(_differences("", *trees)))
    return Fit(choices)


def _fit_text(text: Text, source: Source, budget: float) -> Text:
    """Return a text section that fits the budget: unchanged, in NF4, or else on the CPU."""
    for changed in (text, text.model_copy(update={"precision": BASES[-1]})):
        if text.device == "cpu" or _text_bytes(changed, source, GPU) <= budget:
            return changed
    return text.model_copy(update={"device": "cpu"})


def _sample_at_once(recipe: Recipe, at_once: int) -> Recipe:
    """Limit the number of pictures that a recipe samples at once."""
    changes = {}
    for name, section in (("prior", recipe.class_pictures), ("validation", recipe.validation)):
        if section is not None and section.sampling.batch_size > at_once:
            sampling = section.sampling.model_copy(update={"batch_size": at_once})
            changes[name] = section.model_copy(update={"sampling": sampling})
    return recipe.model_copy(update=changes)


def _differences(path: str, one: Any, other: Any) -> Iterator[str]:
    """Yield the fields of ``other`` that differ from ``one``, as overrides."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in other:
            yield from _differences(f"{path}.{key}".lstrip("."), one.get(key), other[key])
    elif one != other:
        yield f"{path}={str(other).lower() if isinstance(other, bool) else other}"


def explain_out_of_memory(recipe: Recipe, device: torch.device) -> UserError:
    """Explain in one error that a GPU ran out of memory, with overrides that would fit."""
    free, _ = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    taken = plan(recipe, device).peak
    # the plan may have fitted by calculation and still failed, so look for a smaller one
    found = fit(recipe, min(available, 0.97 * taken.bytes))
    advice = "no settings of this recipe fit, so use a smaller base"
    if found.plan:
        advice = f"add the overrides {' '.join(found.overrides)}"
    return UserError(
        f"The GPU ran out of memory: PyTorch can use {available / GIB:.1f} GiB of it, but the"
        f" recipe needs about {taken.bytes / GIB:.1f} GiB in {taken.name}; {advice}."
    )
