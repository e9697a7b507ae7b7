"""The memory of a whole run, phase by phase, and the fastest settings that fit a card."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from adapters.cascade.tokens import prompt_tokens
from adapters.errors import UserError
from adapters.weights.kinds import AdapterSpec
from finetune.memory.footprint import Footprint, Rehearsal
from finetune.recipe.schema import Recipe
from finetune.step.stages import STAGES, Stage
from unets.precision import dtype_of
from unets.tally import GIB, reserved, total_bytes

GPU = torch.device("cuda")

BASES = ("bf16", "nf4")
"""The precisions of a base that settings are chosen from: the fastest, and the smallest."""

SAMPLED_AT_ONCE = (8, 4, 2, 1)
"""How many pictures may be sampled at a time, where a choice is to be made."""


@dataclass(frozen=True)
class Phase:
    """A part of a run, and what PyTorch reserves of the GPU in it, in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a recipe takes of a device."""

    recipe: Recipe
    device: torch.device
    footprints: Mapping[Stage, Footprint]
    """Of each stage that is trained."""
    phases: tuple[Phase, ...]
    """In the order of the run."""

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.bytes)


def plan(recipe: Recipe, device: torch.device = GPU, text_tokens: int | None = None) -> Plan:
    """What a recipe takes of a device, which need not be there.

    Args:
        recipe: the run; caches are taken to be empty.
        device: a GPU of whatever kind, or a CPU.
        text_tokens: how many tokens prompts are padded to; ``None``: what the pipelines' code says.

    Raises:
        UserError: where a base's configuration is not there, or a target matches nothing.
    """
    tokens = text_tokens or prompt_tokens()
    rehearsals = {s: Rehearsal.of(recipe, s, device, tokens) for s in recipe.trained}
    footprints = {stage: each.footprint() for stage, each in rehearsals.items()}
    return Plan(recipe, device, footprints, tuple(_run(recipe, device, rehearsals, footprints)))


def _run(
    recipe: Recipe,
    device: torch.device,
    rehearsals: Mapping[Stage, Rehearsal],
    footprints: Mapping[Stage, Footprint],
) -> Iterator[Phase]:
    prior, validation = recipe.prior, recipe.validation
    if recipe.text.device == "auto":
        yield Phase("encoding captions", _text_encoder_bytes(recipe, device))
    below = STAGES[1]
    if validation.prompts or (prior and not prior.folder):
        rehearsals = {below: _untrained(recipe, below, device, rehearsals)} | dict(rehearsals)
    if prior and not prior.folder:
        at_once = min(prior.count, prior.sampling.batch_size)
        weights = sum(each.weights_bytes for each in rehearsals.values())
        most = max(each.drawing_bytes(at_once) for each in rehearsals.values())
        yield Phase("class pictures", reserved(weights + most))
    for stage, footprint in footprints.items():
        at_once = min(len(validation.prompts), validation.sampling.batch_size)
        if at_once and stage.super_resolution:
            sampler = rehearsals[below]
            drawing = sampler.weights_bytes + sampler.drawing_bytes(at_once)
            resident = footprint.resident
            yield Phase(f"{stage.name}, {below.name}'s samples", reserved(resident + drawing))
        yield Phase(f"{stage.name}, training", footprint.reserved)
        if at_once:
            drawing = rehearsals[stage].drawing_bytes(at_once)
            yield Phase(f"{stage.name}, validation", reserved(footprint.resident + drawing))


def _untrained(
    recipe: Recipe, stage: Stage, device: torch.device, rehearsals: Mapping[Stage, Rehearsal]
) -> Rehearsal:
    """A stage that others need pictures of: where it is not trained, in their precision.

    Their adapter may fit none of its modules; the default one fits any, and takes next to nothing.
    """
    if stage in rehearsals:
        return rehearsals[stage]
    (other, rehearsal), *_ = rehearsals.items()
    training = recipe.training(other).model_copy(update={"adapter": AdapterSpec()})
    as_that = recipe.model_copy(update={stage.name: training})
    return Rehearsal.of(as_that, stage, device, rehearsal.text_tokens)


def _text_encoder_bytes(recipe: Recipe, device: torch.device) -> int:
    """The encoder's weights, and the largest of them restored."""
    precision = recipe.text.precision_on(device)
    encoder = recipe.source(STAGES[1]).blank_text_encoder(precision, dtype_of(precision))
    weights = list(encoder.state_dict().values())
    largest = max(weight.numel() for weight in weights) * dtype_of(precision).itemsize
    return reserved(total_bytes(weights) + largest)


@dataclass(frozen=True)
class Settings:
    """What of a stage's section decides on its memory."""

    precision: str
    gradient_checkpointing: bool
    batch_size: int
    accumulation: int


@dataclass(frozen=True)
class Choice:
    """Settings, and what they take."""

    settings: Settings
    rehearsal: Rehearsal
    footprint: Footprint

    @property
    def work(self) -> float:
        """A measure of the time of an optimizer step."""
        return self.settings.accumulation * self.footprint.work


def fitting_settings(recipe: Recipe, stage: Stage, budget: float, text_tokens: int) -> list[Choice]:
    """Settings of a stage that fit a budget and train as its own do, the fastest first.

    Each keeps the recipe's pictures a step: batches that are smaller are accumulated. What is
    tried: a base in bf16 and in NF4, without and with gradient checkpointing; of each, the largest
    batch that fits.

    Args:
        recipe: with the stage's own settings.
        stage: one of its stages.
        budget: what PyTorch may reserve, in bytes.
        text_tokens: see :func:`plan`.
    """
    own = recipe.training(stage)
    pictures = own.batch_size * own.accumulation
    sizes = [n for n in range(pictures, 0, -1) if pictures % n == 0]
    found = []
    choices = [(precision, again) for precision in BASES for again in (False, True)]
    for precision, again in tqdm(choices, f"Settings of {stage.name}", leave=False, delay=2):
        fields = {"precision": precision, "gradient_checkpointing": again}
        tried = recipe.model_copy(update={stage.name: own.model_copy(update=fields)})
        rehearsal = Rehearsal.of(tried, stage, GPU, text_tokens)
        for size in sizes:
            footprint = rehearsal.footprint(size)
            if footprint.reserved <= budget:
                settings = Settings(precision, again, size, pictures // size)
                found.append(Choice(settings, rehearsal, footprint))
                break
    return sorted(found, key=lambda choice: choice.work)


@dataclass(frozen=True)
class Fit:
    """The fastest settings of a recipe that fit a budget."""

    choices: Mapping[Stage, Sequence[Choice]]
    """By stage, the fastest first; none where nothing fits."""
    recipe: Recipe | None
    """The recipe with the settings; ``None``: nothing fits."""
    overrides: tuple[str, ...]
    """What it says otherwise than the recipe that was asked for, as the command line takes it."""


def fit(recipe: Recipe, budget: float, text_tokens: int | None = None) -> Fit:
    """The fastest settings of a recipe, in all its phases, that fit a budget in bytes."""
    tokens = text_tokens or prompt_tokens()
    choices = {s: fitting_settings(recipe, s, budget, tokens) for s in recipe.trained}
    text = _fitting_text(recipe, budget)
    if not all(choices.values()):
        return Fit(choices, None, ())
    for rank in range(max(map(len, choices.values()))):  # the fastest of all stages, then the next
        chosen = {stage: found[min(rank, len(found) - 1)] for stage, found in choices.items()}
        for at_once in SAMPLED_AT_ONCE:
            changed = _sampling(_changed(text, chosen), at_once)
            rehearsals = {stage: choice.rehearsal for stage, choice in chosen.items()}
            footprints = {stage: choice.footprint for stage, choice in chosen.items()}
            phases = _run(changed, GPU, rehearsals, footprints)
            if max(phase.bytes for phase in phases) <= budget:
                return Fit(choices, changed, tuple(_differences(recipe, changed)))
    return Fit(choices, None, ())


def _changed(recipe: Recipe, chosen: Mapping[Stage, Choice]) -> Recipe:
    """A recipe with the settings of its stages; what comes to the same is left as it is."""
    changes = {}
    for stage, choice in chosen.items():
        own, fields = recipe.training(stage), asdict(choice.settings)
        if own.precision_on(GPU) == fields["precision"]:
            del fields["precision"]
        changes[stage.name] = own.model_copy(update=fields)
    return recipe.model_copy(update=changes)


def _fitting_text(recipe: Recipe, budget: float) -> Recipe:
    """A recipe whose text encoder fits: as it is, in NF4, or else on the CPU."""
    if recipe.text.device == "cpu":
        return recipe
    for changes in ({}, {"precision": BASES[-1]}):
        changed = recipe.model_copy(update={"text": recipe.text.model_copy(update=changes)})
        if _text_encoder_bytes(changed, GPU) <= budget:
            return changed
    return recipe.model_copy(update={"text": recipe.text.model_copy(update={"device": "cpu"})})


def out_of_memory(recipe: Recipe, device: torch.device) -> UserError:
    """What running out of a GPU's memory ends in: one sentence, with overrides that would fit."""
    free, _ = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    taken = plan(recipe, device).peak
    # a plan that fits by calculation was no good: the next smaller one is wanted
    found = fit(recipe, min(available, 0.97 * taken.bytes))
    advice = (
        f"give the overrides {' '.join(found.overrides)}"
        if found.recipe
        else ("no settings of this recipe fit, so take a smaller base")
    )
    return UserError(
        f"The GPU ran out of memory: PyTorch can have {available / GIB:.1f} GiB of it, and the"
        f" recipe takes about {taken.bytes / GIB:.1f} GiB in {taken.name}; {advice}."
    )


def _sampling(recipe: Recipe, at_once: int) -> Recipe:
    """A recipe that samples at most so many pictures at a time."""
    changes = {}
    for name, section in (("prior", recipe.prior), ("validation", recipe.validation)):
        if section is not None and section.sampling.batch_size > at_once:
            sampling = section.sampling.model_copy(update={"batch_size": at_once})
            changes[name] = section.model_copy(update={"sampling": sampling})
    return recipe.model_copy(update=changes)


def _differences(one: Recipe, other: Recipe) -> Iterator[str]:
    """What ``other`` says otherwise, as overrides."""

    def walk(path: str, a: Any, b: Any) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in b:
                yield from walk(f"{path}.{key}" if path else key, a.get(key), b[key])
        elif a != b:
            yield f"{path}={str(b).lower() if isinstance(b, bool) else b}"

    return walk("", one.model_dump(mode="json"), other.model_dump(mode="json"))
