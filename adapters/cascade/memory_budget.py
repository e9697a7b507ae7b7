"""The choice of a precision and a place for each part of a cascade, to fit sampling into a memory.

The pictures' quality comes first, then speed: a UNet is quantised only if nothing else fits, not
even with every part resting in main memory while others draw.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from adapters.base.estimates import drawing_inputs, safety_checker_bytes, text_encoder_bytes
from adapters.base.source import Source
from adapters.errors import UserError
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.in_place import QuantisedLayer
from adapters.weights.updates import Dense, LowRank, Term, Update, as_matrix
from unets.frozen import Quantised
from unets.loading import blank_unet
from unets.precision import Precision
from unets.tally import DRIVER_BYTES, GIB, META, forward_bytes, reserved, total_bytes

TEXT = "text encoder"

GPU = torch.device("cuda")

UNFUSED = 1.35
"""The upscaler's memory as a multiple of the count: its convolutions copy pictures to rearrange."""

AT_ONCE = (8, 4, 2, 1)
"""The numbers of pictures that may be drawn at once."""

PartMemory = tuple[int, Mapping[int, int]]
"""The bytes of a part's weights, and the bytes that its work adds by number of pictures at once,
including the safety checker while it is on the GPU."""


@dataclass(frozen=True)
class Arrangement:
    """The parts' precisions, and the parts that leave the GPU while they are not in use."""

    text: Precision
    stage_1: Precision
    stage_2: Precision
    away: tuple[str, ...]

    def precision(self, part: str) -> Precision:
        """Look up the precision of a part; the upscaler's is always bf16."""
        own = {TEXT: self.text, "stage_1": self.stage_1, "stage_2": self.stage_2}
        return own.get(part, "bf16")


ALL = (TEXT, "stage_1", "stage_2", "stage_3")
ARRANGEMENTS = (
    Arrangement("bf16", "bf16", "bf16", ()),
    Arrangement("bf16", "bf16", "bf16", (TEXT,)),
    Arrangement("nf4", "bf16", "bf16", (TEXT,)),
    Arrangement("nf4", "bf16", "bf16", (TEXT, "stage_3")),
    Arrangement("nf4", "bf16", "bf16", ALL),
    Arrangement("nf4", "nf4", "bf16", (TEXT,)),
    Arrangement("nf4", "nf4", "bf16", (TEXT, "stage_3")),
    Arrangement("nf4", "nf4", "bf16", ALL),
    Arrangement("nf4", "nf4", "nf4", (TEXT, "stage_3")),
    Arrangement("nf4", "nf4", "nf4", ALL),
)
"""The arrangements to try, best first."""


@dataclass(frozen=True)
class Budget:
    """The arrangement chosen for a cascade."""

    arrangement: Arrangement
    at_once: int
    """The number of pictures drawn at once."""
    weights: Mapping[str, int]
    """The bytes of each part's weights."""
    peak: int
    """The most that PyTorch reserves, in bytes."""

    def __str__(self) -> str:
        """Describe the arrangement for people, one line for each part."""
        places = {True: "in main memory while idle", False: "stays on the GPU"}
        parts = [
            f"  {part:13} {self.arrangement.precision(part):5} {size / GIB:5.2f} GiB,"
            f" {places[part in self.arrangement.away]}"
            for part, size in self.weights.items()
        ]
        last = f"{self.at_once} at a time, {self.peak / GIB:.1f} GiB of GPU memory expected"
        return "\n".join([*parts, f"  pictures      {last}"])


def parse_memory(memory: str, what: str = "memory") -> float:
    """Parse a card's memory, such as ``6GB``, into the bytes that PyTorch may reserve.

    A GB is 2^30 bytes, as cards are sold; ``what`` names the argument in messages.

    Raises:
        UserError: if it is not a size, or the driver needs all of it.
    """
    match = re.fullmatch(
        r"(\d{1,6}(?:\.\d{1,9})?)\s*(?:GB|GiB|G)?", str(memory).strip(), re.IGNORECASE
    )
    if match is None or float(match[1]) * GIB <= DRIVER_BYTES:
        raise UserError(
            f"{what} must be the memory of a card, such as 6GB, and more than the"
            f" {DRIVER_BYTES / GIB:.1f} GB that its driver takes (got {memory!r})."
        )
    return float(match[1]) * GIB - DRIVER_BYTES


_limited: set[torch.device] = set()


def limit(device: torch.device, memory: str | None) -> None:
    """Limit the GPU memory that PyTorch may use; ``None``: all. A UserError if there is less."""
    if memory is None:
        if device in _limited:
            _limited.remove(device)
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    total = torch.cuda.get_device_properties(device).total_memory
    share = parse_memory(memory) / total
    if share > 1:
        raise UserError(
            f"memory={memory!r} is more than this GPU has ({total / GIB:.1f} GiB); give that much"
            " or less."
        )
    _limited.add(device)
    torch.cuda.set_per_process_memory_fraction(share, device)


def choose_arrangement(
    sources: Mapping[int, Source],
    memory: str,
    *,
    text_encoder: bool = True,
    adapters: Mapping[int, Sequence[StageAdapter]] | None = None,
) -> Budget:
    """Choose the best of :data:`ARRANGEMENTS` that fits a card, and the most pictures at once.

    Models and merged adapters are by the stage's number; ``memory`` is as for :func:`parse_memory`.

    Raises:
        UserError: if nothing fits, or a model is missing.
    """
    budget = parse_memory(memory)
    parts = {f"stage_{number}": source for number, source in sources.items()}
    if text_encoder:
        parts = {TEXT: sources[min(sources)]} | parts

    @cache
    def estimate(part: str, precision: Precision) -> PartMemory:
        source = parts[part]
        if part == TEXT:
            weights, largest = text_encoder_bytes(source, precision)
            return weights, dict.fromkeys(AT_ONCE, largest)
        if source.stage == 3:
            return _upscaler(source, sources[max(number for number in sources if number < 3)])
        return _stage(source, precision, (adapters or {}).get(source.stage, ()))

    peaks = []
    for arrangement in ARRANGEMENTS:
        taken = {part: estimate(part, arrangement.precision(part)) for part in parts}
        weights = {part: own for part, (own, _) in taken.items()}
        moved = {part: own if part in arrangement.away else 0 for part, own in weights.items()}
        resident = sum(weights.values()) - sum(moved.values())
        for at_once in AT_ONCE:
            using = max(working[at_once] + moved[part] for part, (_, working) in taken.items())
            peaks.append(reserved(resident + using))
            if peaks[-1] <= budget:
                return Budget(arrangement, at_once, weights, peaks[-1])
    raise UserError(
        f"memory={memory!r} leaves {budget / GIB:.1f} GiB after the driver's share, but this"
        f" cascade needs at least {min(peaks) / GIB:.1f} GiB; leave out a stage, or use smaller"
        " ones."
    )


def _stage(source: Source, precision: Precision, adapters: Sequence[StageAdapter]) -> PartMemory:
    """Estimate the memory of a stage's UNet with adapters."""
    unet = blank_unet(source.unet_config, precision, GPU)
    weights = [*unet.state_dict().values(), *lay_over(unet, adapters)]
    drawing, guard = _drawing(unet, weights), safety_checker_bytes(source, unet.dtype)
    return total_bytes(weights), {n: size + guard for n, size in drawing.items()}


def lay_over(unet: UNet2DConditionModel, adapters: Sequence[StageAdapter]) -> list[Tensor]:
    """Lay adapters over a UNet on the meta device, to count their memory.

    Returns:
        The adapters' tensors that :class:`adapters.merging.in_place.MergedAdapters` keeps on the
        UNet's device.
    """
    kept: list[Tensor | None] = []
    modules = dict(unet.named_modules())
    for name in {name for adapter in adapters for name in adapter.modules} & modules.keys():
        layer = modules[name]
        updates = [_blank_update(each, name, layer) for each in adapters if name in each.modules]
        kept += [t for u in updates if isinstance(u, LowRank) for t in (u.a, u.b, u.gain)]
        if isinstance(layer, Quantised):
            QuantisedLayer(layer).write(tuple(Term(1.0, update) for update in updates))
            kept += vars(layer.overlay).values()
    return [tensor for tensor in kept if tensor is not None]


def _blank_update(adapter: StageAdapter, name: str, layer: nn.Module) -> Update:
    """Build an adapter's update of a layer's weight, without values."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if adapter.has_factors:
        return adapter.update(name, weight)
    return Dense(torch.empty_like(as_matrix(weight)))


def _upscaler(source: Source, below: Source) -> PartMemory:
    """Estimate the x4 upscaler's memory: its UNet, and its decoder for one picture at a time."""
    configs = [source.files.read_config(f"{part}/config.json") for part in ("vae", "text_encoder")]
    with source.files.reading(), torch.device(META):
        unet = UNet2DConditionModel.from_config(source.unet_config)
        vae = AutoencoderKL.from_config(configs[0])
        text = CLIPTextModel(CLIPTextConfig.from_dict(configs[1]))
    models = [nn.Module.to(model, torch.bfloat16).eval() for model in (unet, vae, text)]
    weights = [weight for model in models for weight in model.state_dict().values()]
    size_px = below.picture_size_px
    shape = (1, vae.config.latent_channels, size_px, size_px)
    latent = torch.empty(shape, dtype=torch.bfloat16, device=META)
    decoding = forward_bytes(vae.decode, {"z": latent}, weights) + total_bytes([latent])
    drawing, guard = _drawing(unet, weights, size_px), safety_checker_bytes(below, torch.bfloat16)
    working = {n: int(UNFUSED * max(size, decoding)) + guard for n, size in drawing.items()}
    return total_bytes(weights), working


def _drawing(
    unet: UNet2DConditionModel, weights: Sequence[Tensor], size_px: int | None = None
) -> dict[int, int]:
    """Estimate the bytes that drawing adds to the weights, linear in the pictures at once."""

    def held(pictures: int) -> int:
        inputs = drawing_inputs(unet, pictures, size_px)
        return forward_bytes(unet, inputs, weights) + total_bytes(inputs.values())

    most, least = max(AT_ONCE), min(AT_ONCE)
    large, small = held(most), held(least)
    return {n: small + (large - small) * (n - least) // (most - least) for n in AT_ONCE}
