"""The memory of a whole run, phase by phase, and the fastest settings that fit a card."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from finetune.footprint import GIB, Footprint, Rehearsal, reserved, total_bytes
from finetune.recipe import Recipe
from finetune.stages import STAGES, Stage
from finetune.text import DTYPES, prompt_tokens

GPU = torch.device("cuda")

DRIVER_BYTES = 0.5 * GIB
"""What the driver and CUDA's own context keep of a card's memory."""

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
    if prior and not prior.folder:
        at_once = min(prior.count, prior.sampling.batch_size)
        weights = sum(footprint.weights for footprint in footprints.values())
        most = max(each.sampling_bytes(at_once) for each in rehearsals.values())
        yield Phase("class pictures", reserved(weights + most))
    for stage, footprint in footprints.items():
        yield Phase(f"{stage.name}, training", footprint.reserved)
        if at_once := min(len(validation.prompts), validation.sampling.batch_size):
            sampling = rehearsals[stage].sampling_bytes(at_once)
            yield Phase(f"{stage.name}, validation", reserved(footprint.resident + sampling))


def _text_encoder_bytes(recipe: Recipe, device: torch.device) -> int:
    """The encoder's weights, and the largest of them restored."""
    automatic = "fp32" if device.type == "cpu" else "bf16"
    precision = automatic if recipe.text.precision == "auto" else recipe.text.precision
    encoder = recipe.source(STAGES[1]).blank_text_encoder(precision, DTYPES[precision])
    weights = {id(tensor): tensor for tensor in encoder.state_dict().values()}.values()
    largest = max(weight.numel() for weight in weights) * DTYPES[precision].itemsize
    return reserved(total_bytes(weights) + largest)


@dataclass(frozen=True)
class Settings:
    """What of a stage's section decides on its memory."""

    precision: str
    gradient_checkpointing: bool
    batch_size: int
    accumulation: int


Choice = tuple[Settings, Footprint]
"""Settings, and what they take."""


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
    least = 1 if recipe.prior is None else 2
    sizes = [n for n in range(pictures, least - 1, -1) if pictures % n == 0]
    found = []
    choices = [(precision, again) for precision in BASES for again in (False, True)]
    for precision, again in tqdm(choices, f"Settings of {stage.name}", leave=False, delay=2):
        for size in sizes:
            settings = Settings(precision, again, size, pictures // size)
            changed = own.model_copy(update=asdict(settings))
            tried = recipe.model_copy(update={stage.name: changed})
            footprint = Rehearsal.of(tried, stage, GPU, text_tokens).footprint()
            if footprint.reserved <= budget:
                found.append((settings, footprint))
                break
    return sorted(found, key=lambda pair: pair[0].accumulation * pair[1].work)


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
    changed = recipe
    for stage, found in choices.items():
        if not found:
            return Fit(choices, None, ())
        own, fields = recipe.training(stage), asdict(found[0][0])
        if own.precision_on(GPU) == fields["precision"]:
            del fields["precision"]
        changed = changed.model_copy(update={stage.name: own.model_copy(update=fields)})
    if changed.text.device == "auto" and _text_encoder_bytes(changed, GPU) > budget:
        small = changed.text.model_copy(update={"precision": BASES[-1]})
        changed = changed.model_copy(update={"text": small})
        if _text_encoder_bytes(changed, GPU) > budget:
            there = recipe.text.model_copy(update={"device": "cpu"})
            changed = changed.model_copy(update={"text": there})
    for at_once in SAMPLED_AT_ONCE:
        sampled = _sampling(changed, at_once)
        if plan(sampled, GPU, tokens).peak.bytes <= budget:
            return Fit(choices, sampled, tuple(_differences(recipe, sampled)))
    return Fit(choices, None, ())


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
