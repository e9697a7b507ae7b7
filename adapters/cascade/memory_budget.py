"""A precision and a place for each part of a cascade, such that sampling stays within a memory.

The pictures' own precision comes first, then speed: a UNet is quantised only where it does not fit
otherwise, even with every part in main memory while others draw.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from adapters.base.source import Source
from adapters.cascade.tokens import prompt_tokens
from adapters.errors import UserError
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.in_place import Coded
from adapters.weights.updates import Dense, LowRank, Term, Update, as_matrix
from unets.frozen import Quantised
from unets.loading import Precision, blank_unet, compute_dtype
from unets.tally import DRIVER_BYTES, GIB, META, Tally, reserved, total_bytes

TEXT = "text encoder"

GPU = torch.device("cuda")

NOT_FUSED = 1.35
"""What the upscaler takes beside what is counted: its convolutions turn pictures around."""

AT_ONCE = (8, 4, 2, 1)
"""How many pictures may be drawn at once."""


@dataclass(frozen=True)
class Row:
    """The parts' precision, and which of them leave the GPU while they are not used."""

    text: Precision
    stage_1: Precision
    stage_2: Precision
    away: tuple[str, ...]

    def precision(self, part: str) -> Precision:
        """Of a part; the upscaler has but one."""
        own = {TEXT: self.text, "stage_1": self.stage_1, "stage_2": self.stage_2}
        return own.get(part, "bf16")


ALL = (TEXT, "stage_1", "stage_2", "stage_3")
ROWS = (
    Row("bf16", "bf16", "bf16", ()),
    Row("bf16", "bf16", "bf16", (TEXT,)),
    Row("nf4", "bf16", "bf16", (TEXT,)),
    Row("nf4", "bf16", "bf16", (TEXT, "stage_3")),
    Row("nf4", "bf16", "bf16", ALL),
    Row("nf4", "nf4", "bf16", (TEXT,)),
    Row("nf4", "nf4", "bf16", (TEXT, "stage_3")),
    Row("nf4", "nf4", "bf16", ALL),
    Row("nf4", "nf4", "nf4", (TEXT, "stage_3")),
    Row("nf4", "nf4", "nf4", ALL),
)
"""What is tried, best first."""


@dataclass(frozen=True)
class Budgeted:
    """What was chosen for a cascade."""

    row: Row
    at_once: int
    """How many pictures are drawn at once."""
    weights: Mapping[str, int]
    """The bytes of each part's weights."""
    peak: int
    """What PyTorch reserves at most, in bytes."""

    def __str__(self) -> str:
        """What a person is told."""
        places = {True: "in main memory while it rests", False: "stays on the GPU"}
        parts = [
            f"  {part:13} {self.row.precision(part):5} {size / GIB:5.2f} GiB,"
            f" {places[part in self.row.away]}"
            for part, size in self.weights.items()
        ]
        last = f"{self.at_once} at a time, {self.peak / GIB:.1f} GiB of the GPU foreseen"
        return "\n".join([*parts, f"  pictures      {last}"])


@dataclass(frozen=True)
class Part:
    """A part of a cascade: what it weighs, and what it needs to work with."""

    name: str
    weights: int
    working: Mapping[int, int]
    """By how many pictures are drawn at once; in bytes beside the weights, the safety checker's
    included, which visits while a recording is there."""


def memory_bytes(memory: str, what: str = "memory") -> float:
    """What PyTorch may reserve of a card, in bytes.

    Args:
        memory: the card's, such as ``6GB`` (of 2^30 bytes, as cards are sold).
        what: the argument, for messages.

    Raises:
        UserError: where it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?", str(memory).strip(), re.IGNORECASE)
    if match is None or float(match[1]) * GIB <= DRIVER_BYTES:
        raise UserError(
            f"{what} must be the memory of a card, such as 6GB, and more than the"
            f" {DRIVER_BYTES / GIB:.1f} GB that its driver takes (got {memory!r})."
        )
    return float(match[1]) * GIB - DRIVER_BYTES


_limited: set[torch.device] = set()


def limit(device: torch.device, memory: str | None) -> None:
    """Let PyTorch have no more of a GPU than a memory; ``None``: take such a limit away again.

    Raises:
        UserError: where the GPU has less.
    """
    if memory is None:
        if device in _limited:
            _limited.remove(device)
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    has = torch.cuda.get_device_properties(device).total_memory
    share = memory_bytes(memory) / has
    if share > 1:
        raise UserError(
            f"memory={memory!r} is more than this GPU has, which is {has / GIB:.1f} GiB; give what"
            " it has or less."
        )
    _limited.add(device)
    torch.cuda.set_per_process_memory_fraction(share, device)


def within(
    sources: Mapping[int, Source],
    memory: str,
    *,
    text_encoder: bool = True,
    adapters: Mapping[int, Sequence[StageAdapter]] | None = None,
) -> Budgeted:
    """The best row of :data:`ROWS` that fits a card, and the most pictures at once.

    Args:
        sources: of the stages, by number.
        memory: the card's, see :func:`memory_bytes`.
        text_encoder: whether one is wanted.
        adapters: what is merged into Stage I and II, by number.

    Raises:
        UserError: where nothing fits, or a model is not there.
    """
    budget = memory_bytes(memory)
    tokens = prompt_tokens()
    below = sources[max(number for number in sources if number < 3)]
    made: dict[tuple[str, Precision], Part] = {}
    smallest = None
    for row in ROWS:
        parts = []
        for number, source in sources.items():
            key = f"stage_{number}", row.precision(f"stage_{number}")
            if key not in made:
                own = (adapters or {}).get(number, ())
                made[key] = (
                    _upscaler(source, below) if number == 3 else _stage(source, *key, tokens, own)
                )
            parts.append(made[key])
        if text_encoder:
            key = TEXT, row.text
            if key not in made:
                made[key] = _text_encoder(sources[min(sources)], row.text)
            parts.insert(0, made[key])
        for at_once in AT_ONCE:
            peak = _peak(parts, row.away, at_once)
            smallest = min(peak, smallest or peak)
            if peak <= budget:
                return Budgeted(row, at_once, {part.name: part.weights for part in parts}, peak)
    raise UserError(
        f"memory={memory!r} leaves {budget / GIB:.1f} GiB beside the driver's, and this cascade"
        f" takes {(smallest or 0) / GIB:.1f} GiB at least; leave a stage out, or take smaller ones."
    )


def _peak(parts: Sequence[Part], away: Sequence[str], at_once: int) -> int:
    """What PyTorch reserves while the most demanding part works."""
    resident = sum(part.weights for part in parts if part.name not in away)
    using = max(
        part.working[at_once] + (part.weights if part.name in away else 0) for part in parts
    )
    return reserved(resident + using)


def _text_encoder(source: Source, precision: Precision) -> Part:
    """Its weights, and the largest of them restored; prompts are encoded a few at a time."""
    encoder = source.blank_text_encoder(precision, torch.bfloat16)
    weights = list(encoder.state_dict().values())
    largest = 2 * max(weight.numel() for weight in weights)
    return Part(TEXT, total_bytes(weights), dict.fromkeys(AT_ONCE, largest))


def _stage(
    source: Source,
    name: str,
    precision: Precision,
    tokens: int,
    adapters: Sequence[StageAdapter],
) -> Part:
    """A stage's UNet with adapters, which sees each picture with its unguided twin."""
    unet = blank_unet(source.unet_config, precision, GPU)
    weights, dtype = list(unet.state_dict().values()), compute_dtype(precision, GPU)
    weights += laid_over(unet, adapters)
    inputs = _unet_inputs(unet, source.picture_size_px, tokens, unet.config.encoder_hid_dim, dtype)
    guard = total_bytes(source.guard_weights(dtype))
    working = {n: held + guard for n, held in _working(unet, weights, inputs).items()}
    return Part(name, total_bytes(weights), working)


def laid_over(unet: UNet2DConditionModel, adapters: Sequence[StageAdapter]) -> list[Tensor]:
    """Lay adapters over a UNet on the meta device.

    Returns:
        What :class:`adapters.merging.in_place.MergedAdapters` keeps of them beside the UNet on its
        device.
    """
    kept: list[Tensor | None] = []
    modules = dict(unet.named_modules())
    for name in {name for adapter in adapters for name in adapter.modules} & modules.keys():
        layer = modules[name]
        updates = [_blank_update(each, name, layer) for each in adapters if name in each.modules]
        kept += [t for u in updates if isinstance(u, LowRank) for t in (u.a, u.b, u.gain)]
        if isinstance(layer, Quantised):
            Coded(layer).write([Term(1.0, update) for update in updates])
            kept += vars(layer.overlay).values()
    return [tensor for tensor in kept if tensor is not None]


def _blank_update(adapter: StageAdapter, name: str, layer: nn.Module) -> Update:
    """What an adapter makes of a layer's weight, without values."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if adapter.has_factors:
        return adapter.update(name, weight)
    return Dense(torch.empty_like(as_matrix(weight)))


def _upscaler(source: Source, below: Source) -> Part:
    """The x4 upscaler of a stage's pictures: its UNet, and its decoder, one picture at a time."""
    size_px = below.picture_size_px
    with torch.device(META):
        unet = UNet2DConditionModel.from_config(
            source.load(UNet2DConditionModel.load_config, "unet")
        )
        vae = AutoencoderKL.from_config(source.load(AutoencoderKL.load_config, "vae"))
        text = CLIPTextModel(source.load(CLIPTextConfig.from_pretrained, "text_encoder"))
    models = [nn.Module.to(model, torch.bfloat16).eval() for model in (unet, vae, text)]
    weights = [weight for model in models for weight in model.state_dict().values()]
    guard = total_bytes(below.guard_weights(torch.bfloat16))
    tokens, width = text.config.max_position_embeddings, text.config.hidden_size
    inputs = _unet_inputs(unet, size_px, tokens, width, torch.bfloat16)

    latent = torch.empty(
        1, vae.config.latent_channels, size_px, size_px, dtype=torch.bfloat16, device=META
    )
    draws, decodes = _working(unet, weights, inputs), _held(_Decoder(vae), weights, {"z": latent})
    working = {n: int(NOT_FUSED * max(draws[n], decodes)) + guard for n in AT_ONCE}
    return Part("stage_3", total_bytes(weights), working)


def _unet_inputs(
    unet: UNet2DConditionModel, size_px: int, tokens: int, width: int, dtype: torch.dtype
) -> Callable[[int], dict[str, Tensor]]:
    """A UNet's inputs for so many pictures, on the meta device."""
    channels = unet.config.in_channels

    def inputs(count: int) -> dict[str, Tensor]:
        return {
            "sample": torch.empty(count, channels, size_px, size_px, dtype=dtype, device=META),
            "timestep": torch.empty((), dtype=torch.int64, device=META),
            "encoder_hidden_states": torch.empty(count, tokens, width, dtype=dtype, device=META),
            "class_labels": torch.empty(count, dtype=torch.int64, device=META),
        }

    return inputs


def _working(
    model: nn.Module, weights: Sequence[Tensor], inputs: Callable[[int], dict[str, Tensor]]
) -> dict[int, int]:
    """What forward passes hold beside the weights, by pictures at once: linear in their number."""
    most, least = max(AT_ONCE), min(AT_ONCE)
    large, small = (_held(model, weights, inputs(2 * count)) for count in (most, least))
    return {n: small + (large - small) * (n - least) // (most - least) for n in AT_ONCE}


def _held(model: nn.Module, weights: Sequence[Tensor], given: Mapping[str, Tensor]) -> int:
    """What a forward pass holds at once, its inputs included."""
    with torch.no_grad(), Tally([*weights, *given.values()]) as tally:
        model(**given)
    return tally.peak_bytes + total_bytes(given.values())


class _Decoder(nn.Module):
    """An autoencoder's decoding as a forward pass."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        pictures: Tensor = self.vae.decode(z, return_dict=False)[0]
        return pictures
