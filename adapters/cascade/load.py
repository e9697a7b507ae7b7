"""Loading a cascade."""

import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from tqdm import tqdm

from adapters.arguments import STAGES, Scale, find_device, split_scale
from adapters.base.source import GUARDS, Source
from adapters.base.stored_unet import StoredUNet
from adapters.cascade.adapter_set import find_adapters
from adapters.cascade.cascade import Cascade
from adapters.cascade.habits import LOADING, check_arguments
from adapters.cascade.memory_budget import TEXT, choose_arrangement, limit, parse_memory
from adapters.cascade.offload import Placement
from adapters.errors import UserError, closest, quote
from adapters.files.stage_adapter import StageAdapter
from unets.precision import Precision, automatic_precision, compute_dtype

Chosen: TypeAlias = Literal["auto"] | Precision
"""The precision of a UNet; ``auto``: the one that suits the device."""

Adapters: TypeAlias = (
    str
    | Path
    | Sequence[str | Path | tuple[str | Path, Scale]]
    | Mapping[str, Scale]
    | Mapping[Path, Scale]
)
"""Exported folders or hub names, one or several, optionally each with its scale."""


@dataclass(frozen=True)
class Parts:
    """The parts of a cascade to load, and those that the caller provides."""

    text_encoder: bool = True
    """Load the text encoder of Stage I (of Stage II if that is alone); without it, ``embeds`` must
    be given."""
    unets: Mapping[int, UNet2DConditionModel] = field(default_factory=dict, repr=False)
    """UNets to sample from instead of loading them, by stage; they keep their precision."""
    originals: Literal["device", "cpu"] = "device"
    """The place of the base's own values of the weights that adapters change: on the UNet's device,
    so that switching adapters takes milliseconds, or on the ``cpu``, which saves memory on the
    device but needs a transfer each time (:class:`adapters.merging.in_place.MergedAdapters`)."""


MOVED: Mapping[str, str] = MappingProxyType(
    {
        "scale": "give the scale of each adapter, adapters={folder: scale}",
        "text_encoder": "give parts=Parts(text_encoder=…)",
        "unets": "give parts=Parts(unets=…)",
        "originals": "give parts=Parts(originals=…)",
    }
)
"""Parameters of version 0.1 that :func:`load_cascade` no longer has, and what replaces them."""


def load_cascade(
    stage_1: str | Path | None = None,
    stage_2: str | Path | None = None,
    stage_3: str | Path | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    adapters: Adapters = (),
    device: str | torch.device = "auto",
    dtype: Chosen | Mapping[int, Chosen] = "auto",
    memory: str | None = None,
    parts: Parts | None = None,
    **moved: object,
) -> Cascade:
    """Load a cascade with diffusers' own pipelines and guards.

    Args:
        stage_1: Stage I, a folder or a hub name, which may end with a revision of its own
            (``owner/name@revision``); ``None``: given pictures are enlarged instead.
        stage_2: Stage II, likewise.
        stage_3: the x4 upscaler, likewise. It uses the guards of the stage before it, as in the
            published cascade.
        revision: the hub revision of Stage I and II if their names have none.
        variant: the weights' variant of Stage I and II, such as ``fp16``; components that lack it
            are read from their plain files, and a message says so.
        adapters: folders of finished runs, exported folders or hub names
            (``owner/name@revision``) to merge, one or several, optionally each with its scale
            (``{"runs/dog": 0.8}``), see :meth:`Cascade.add_adapter`.
        device: the device to draw on; ``auto``: a GPU if there is one.
        dtype: the precision of the UNets, one for all or by stage; ``auto``: bf16 on a GPU, fp32
            elsewhere. With fp16 UNets the text encoder is bf16, as T5-XXL overflows in fp16; with
            quantised UNets it is not quantised.
        memory: a GPU's memory to stay within, such as ``6GB``. The precisions, the parts that rest
            in main memory while others work, and the number of pictures drawn at once are chosen
            to fit it, and printed (:mod:`adapters.cascade.memory_budget`). ``adapters`` are
            counted; those added later come on top. PyTorch in this process is limited to this
            memory until a cascade is loaded without ``memory``. ``None``: everything is on the
            device.
        parts: the parts to load, and those provided; ``None``: everything is loaded.
        **moved: parameters of earlier versions, and of diffusers' ``from_pretrained``; each raises
            an error that says what to do.

    Raises:
        UserError: if a model, an adapter or the device is missing or does not fit.

    Example:
        >>> load_cascade("models/if-tiny/stage_1", "models/if-tiny/stage_2", device="cpu")
                      model                   pictures  parameters  precision  device  adapters
        Stage 1       models/if-tiny/stage_1  32 px     6.8 M       float32    cpu
        Stage 2       models/if-tiny/stage_2  128 px    2.6 M       float32    cpu
        Stage 3       none
        text encoder  T5EncoderModel                    0.5 M       float32    cpu
        guards        none
    """
    _check_names(moved)
    parts = parts or Parts()
    device = find_device(device)
    named = {1: stage_1, 2: stage_2, 3: stage_3}
    sources = {
        number: Source(str(named[number]), number, revision, variant)
        for number in (1, 2)
        if named[number] is not None
    }
    _check_options(sources, parts, memory)
    check_memory(memory, dtype, device)
    everything = sources | ({} if stage_3 is None else {3: Source(str(stage_3), 3)})
    scaled = _scaled(adapters)
    if scaled:
        _check_adapters(scaled, sources, parts.unets)
    folders = [folder for folder, _ in scaled]
    placing, precisions = _place(everything, memory, dtype, device, parts.text_encoder, folders)
    stages, dtypes = {}, {}
    for number, source in sources.items():
        dtypes[number] = compute_dtype(precisions[number], device)
        unet = parts.unets.get(number) or source.unet(precisions[number], device)
        no_text = {"text_encoder": None, "tokenizer": None}
        stages[number] = source.pipeline(dtypes[number], **no_text, unet=unet)
        placing.settle(f"stage_{number}", stages[number])
    last = max(stages)
    upscaler, text = None, None
    if stage_3 is not None:
        upscaler = _upscaler(everything[3], dtypes[last], stages[last], placing)
    if parts.text_encoder:
        text = sources[min(sources)].text_pipeline(precisions[0], device)
        placing.settle(TEXT, text)
    cascade = Cascade(
        stages=stages,
        base_names={number: str(named[number]) for number in everything},
        originals=torch.device("cpu") if parts.originals == "cpu" or memory else None,
        upscaler=upscaler,
        text=text,
        placing=placing,
        revision=revision,
        variant=variant,
    )
    for folder, own_scale in scaled:
        cascade.add_adapter(folder, own_scale)
    return cascade


def _check_names(moved: Mapping[str, object]) -> None:
    valid = {*inspect.signature(load_cascade).parameters} - {"moved"}
    check_arguments(moved, {**LOADING, **MOVED}, valid, "load_cascade()")


def check_memory(
    memory: str | None, dtype: Chosen | Mapping[int, Chosen], device: torch.device
) -> None:
    """Check that the memory to stay within is that of a GPU, and decides on precisions alone.

    Raises:
        UserError: if it is not.
    """
    if memory is not None and (device.type != "cuda" or dtype != "auto"):
        raise UserError(
            f"memory={memory!r} is for a GPU, and chooses the precisions itself; leave dtype at"
            f" auto (got {dtype!r}), and use a GPU as the device (got {device})."
        )


def _check_options(sources: Collection[int], parts: Parts, memory: str | None) -> None:
    """Check that there is a stage to load, and that options are known and compatible."""
    if not sources:
        raise UserError("A cascade needs Stage I, Stage II or both; name at least one model.")
    if not isinstance(parts, Parts):
        raise UserError(f"parts must be a Parts(...) (got {quote(parts)}); make one.")
    if parts.originals not in ("device", "cpu"):
        raise UserError(
            f"originals must be device or cpu (got {parts.originals!r}); choose one of them."
        )
    if odd := sorted(parts.unets.keys() - sources):
        raise UserError(
            f"parts.unets has one for Stage {odd[0]}, but stage_{odd[0]} is not given; give it too."
        )
    if memory is not None:
        parse_memory(memory)
    if memory and parts.unets:
        raise UserError(
            f"With memory={memory!r}, UNets are loaded in precisions that fit; leave out memory or"
            " parts.unets."
        )


def _scaled(adapters: Adapters) -> list[tuple[str | Path, Scale]]:
    """List adapters, each with its scale, by default 1."""
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    several = [adapters] if isinstance(adapters, str) else adapters
    each_or_pair = several if isinstance(several, Sequence) else [several]
    pairs = [each if isinstance(each, tuple) else (each, 1.0) for each in each_or_pair]
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(
                "An adapter must be given as a folder or a hub name, or as a pair of it and its"
                f" scale (got {quote(pair)})."
            )
    return pairs


def _check_adapters(
    adapters: Sequence[tuple[str | Path, Scale]],
    sources: Mapping[int, Source],
    given: Collection[int],
) -> None:
    """Check that adapters belong to the bases, before these are loaded, which takes long.

    UNets that are ``given``, by stage, need not be those of the bases.
    """
    configs = {number: source.unet_config for number, source in sources.items()}
    for folder, scale in adapters:
        fitting = find_adapters(folder, configs)
        split_scale(scale, fitting, configs, f"adapter {str(folder)!r}")
        for number, adapter in fitting.items():
            signed = adapter.info is not None and adapter.info.base_signature is not None
            if signed and number not in given:
                source = sources[number]
                adapter.check_base(StoredUNet.of(source).signature, source.name)


def _by_stage(
    folders: Sequence[str | Path], sources: Mapping[int, Source]
) -> dict[int, list[StageAdapter]]:
    """Load the adapters of folders, by the stage that each belongs to."""
    configs = {number: sources[number].unet_config for number in STAGES if number in sources}
    adapters: dict[int, list[StageAdapter]] = {}
    for adapter in chain.from_iterable(map(StageAdapter.load_all, folders)):
        adapters.setdefault(adapter.stage_among(configs), []).append(adapter)
    return adapters


def _place(
    sources: Mapping[int, Source],
    memory: str | None,
    dtype: Chosen | Mapping[int, Chosen],
    device: torch.device,
    text_encoder: bool,
    adapters: Sequence[str | Path],
) -> tuple[Placement, dict[int, Precision]]:
    """Choose the places of parts, and the precisions by stage (0: the text encoder)."""
    if memory is None:
        limit(device, None)
        precisions = {number: _precision(dtype, number, device) for number in sources}
        first = compute_dtype(precisions[min(sources)], device)
        text: Precision = "fp32" if first == torch.float32 else "bf16"
        return Placement(device), precisions | {0: text}
    merged = _by_stage(adapters, sources)
    chosen = choose_arrangement(sources, memory, text_encoder=text_encoder, adapters=merged)
    limit(device, memory)
    tqdm.write(f"Within {memory}:\n{chosen}", file=sys.stderr)
    parts = {0: TEXT} | {number: f"stage_{number}" for number in sources}
    precisions = {number: chosen.arrangement.precision(part) for number, part in parts.items()}
    return Placement(device, chosen.arrangement.away, chosen.at_once), precisions


def _upscaler(
    source: Source, dtype: torch.dtype, below: DiffusionPipeline, placing: Placement
) -> StableDiffusionUpscalePipeline:
    """Load Stage III, with the guards of the stage below it."""
    upscaler = source.pipeline(dtype)
    guards = {name: below.components[name] for name in GUARDS}
    upscaler.register_modules(**{name: guard for name, guard in guards.items() if guard})
    if placing.at_once is not None:
        upscaler.vae.enable_slicing()  # decodes one picture at a time
    placing.settle("stage_3", upscaler)
    return upscaler


def _precision(dtype: Chosen | Mapping[int, Chosen], stage: int, device: torch.device) -> Precision:
    """Choose the precision of a stage's UNet."""
    own = dtype.get(stage, "auto") if isinstance(dtype, Mapping) else dtype
    names = ("auto", *get_args(Precision))
    if own not in names:
        raise UserError(f"Stage {stage}: unknown dtype {quote(own)}; {closest(str(own), names)}")
    return automatic_precision(device) if own == "auto" else own
