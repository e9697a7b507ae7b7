"""Loading a cascade."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from diffusers import IFPipeline, UNet2DConditionModel
from tqdm import tqdm

from adapters.bases import GUARDS, Source
from adapters.budget import TEXT, memory_bytes, within
from adapters.cascade import Cascade
from adapters.errors import UserError
from adapters.names import closest
from adapters.placing import Placing
from adapters.scales import Scale
from unets.loading import PRECISIONS, Precision, automatic_precision, compute_dtype

Chosen: TypeAlias = Literal["auto"] | Precision
"""The precision of a UNet, or what suits the device."""


def load_cascade(
    stage_1: str | Path | None = None,
    stage_2: str | Path | None = None,
    stage_3: str | Path | None = None,
    *,
    adapters: str | Path | Sequence[str | Path] | Mapping[str, Scale] | Mapping[Path, Scale] = (),
    scale: Scale = 1.0,
    originals: Literal["device", "cpu"] = "device",
    revision: str | None = None,
    variant: str | None = None,
    device: str | torch.device = "auto",
    dtype: Chosen | Mapping[int, Chosen] = "auto",
    memory: str | None = None,
    text_encoder: bool = True,
    unets: Mapping[int, UNet2DConditionModel] | None = None,
) -> Cascade:
    """Load a cascade with diffusers' own pipelines, guards and all.

    Args:
        stage_1: Stage I, a folder or a hub name; ``None``: only given pictures are upsampled.
        stage_2: Stage II.
        stage_3: the x4 upscaler. It is guarded by the modules of the stage before it, as the
            published cascade's is.
        adapters: exported folders or hub names (``owner/name@revision``) to merge, one or several,
            or these with the scale of each, see :meth:`Cascade.add_adapter`.
        scale: of adapters that are given without.
        originals: where the base's own values of the weights that adapters change are kept: beside
            the UNet, so that adapters are switched in milliseconds, or on the ``cpu``, which saves
            that memory (:class:`adapters.mixing.MergedAdapters`) and takes a transfer each time.
        revision: the hub revision of Stage I and II.
        variant: the weights' variant of Stage I and II, such as ``fp16``.
        device: ``auto``: the GPU where there is one.
        dtype: the precision of the UNets, or of each stage's; ``auto``: bf16 on a GPU, fp32
            elsewhere. The text encoder of fp16 UNets is bf16, as T5-XXL overflows in fp16, and
            that of quantised ones is not quantised.
        memory: a GPU's, such as ``6GB``: precisions, which parts rest in main memory while others
            work, and how many pictures are drawn at once are chosen such that all stays within
            it, and told (:mod:`adapters.budget`). This process' PyTorch gets no more of the GPU
            from then on. ``None``: all is on the device.
        text_encoder: whether to load the text encoder of Stage I (of Stage II where that is alone).
        unets: UNets to sample from instead of loading them, by stage; they keep their precision.

    Raises:
        UserError: where a model, an adapter or the device is not there or does not fit.

    Example:
        >>> load_cascade("models/if-tiny/stage_1", "models/if-tiny/stage_2", device="cpu")
                      model                   pictures  parameters  precision  device  adapters
        Stage 1       models/if-tiny/stage_1  32 px     6.8 M       float32    cpu
        Stage 2       models/if-tiny/stage_2  128 px    2.6 M       float32    cpu
        Stage 3       none
        text encoder  T5EncoderModel                    0.5 M       float32    cpu
        guards        none
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = available(device)
    sources = {
        number: Source(str(name), number, revision, variant)
        for number, name in ((1, stage_1), (2, stage_2))
        if name is not None
    }
    if originals not in ("device", "cpu"):
        raise UserError(f"originals must be device or cpu (got {originals!r}); choose one of them.")
    if odd := sorted((unets or {}).keys() - sources.keys()):
        raise UserError(
            f"unets has one for Stage {odd[0]}, which is not named; name its model too."
        )
    if not sources:
        raise UserError("A cascade needs Stage I, Stage II or both; name at least one model.")
    everything = sources | ({} if stage_3 is None else {3: Source(str(stage_3), 3)})
    placing, precisions = _placed(everything, memory, dtype, device, text_encoder)
    stages, dtypes = {}, {}
    for number, source in sources.items():
        dtypes[number] = compute_dtype(precisions[number], device)
        unet = (unets or {}).get(number) or source.unet(precisions[number], device)
        no_text = {"text_encoder": None, "tokenizer": None}
        stages[number] = source.pipeline(dtypes[number], **no_text, unet=unet)
        placing.settle(f"stage_{number}", stages[number])
    upscaler = None
    if stage_3 is not None:
        last = max(stages)
        upscaler = everything[3].pipeline(dtypes[last])
        guards = {name: stages[last].components[name] for name in GUARDS}
        upscaler.register_modules(**{name: guard for name, guard in guards.items() if guard})
        if memory:
            upscaler.vae.enable_slicing()  # decodes one picture at a time
        placing.settle("stage_3", upscaler)
    cascade = Cascade(
        stages=stages,
        base_names={number: source.name for number, source in everything.items()},
        originals=torch.device("cpu") if originals == "cpu" or memory else None,
        upscaler=upscaler,
        text=_text(sources[min(sources)], precisions[0], placing) if text_encoder else None,
        placing=placing,
        revision=revision,
        variant=variant,
    )
    adapters = [adapters] if isinstance(adapters, str | Path) else adapters
    scaled = adapters.items() if isinstance(adapters, Mapping) else ((a, scale) for a in adapters)
    for folder, own_scale in scaled:
        cascade.add_adapter(folder, own_scale)
    return cascade


def _placed(
    sources: Mapping[int, Source],
    memory: str | None,
    dtype: Chosen | Mapping[int, Chosen],
    device: torch.device,
    text_encoder: bool,
) -> tuple[Placing, dict[int, Precision]]:
    """Where parts are, and the precision of the UNets and (0) of the text encoder."""
    if memory is None:
        precisions = {number: _precision(dtype, number, device) for number in sources}
        first = compute_dtype(precisions[min(sources)], device)
        text: Precision = "fp32" if first == torch.float32 else "bf16"
        return Placing(device), precisions | {0: text}
    if device.type != "cuda" or dtype != "auto":
        raise UserError(
            f"memory={memory!r} is about a GPU, and chooses precisions by itself: leave dtype at"
            f" auto (got {dtype!r}), and the device a GPU (got {device})."
        )
    chosen = within(sources, memory, text_encoder=text_encoder)
    of_card = memory_bytes(memory) / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, of_card), device)
    tqdm.write(f"Within {memory}:\n{chosen}", file=sys.stderr)
    parts = {0: TEXT} | {number: f"stage_{number}" for number in sources}
    precisions = {number: chosen.row.precision(part) for number, part in parts.items()}
    return Placing(device, chosen.row.away, chosen.at_once), precisions


def _text(source: Source, precision: Precision, placing: Placing) -> IFPipeline:
    """The tokenizer and text encoder."""
    dtype = PRECISIONS.get(precision, torch.bfloat16)
    pipe = source.text_pipeline(precision, dtype, placing.device)
    placing.settle(TEXT, pipe)
    return pipe


def _precision(dtype: Chosen | Mapping[int, Chosen], stage: int, device: torch.device) -> Precision:
    """The precision of a stage's UNet."""
    own = dtype.get(stage, "auto") if isinstance(dtype, Mapping) else dtype
    names = ("auto", *get_args(Precision))
    if own not in names:
        raise UserError(f"The dtype {own!r} of Stage {stage} is none; {closest(str(own), names)}")
    return automatic_precision(device) if own == "auto" else own


def available(name: str | torch.device) -> torch.device:
    """The device of a name, once something has been placed on it."""
    try:
        placed = torch.empty(0, device=name)
        placed.cpu()  # meta and the like keep no values
        return placed.device
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"The device {str(name)!r} cannot be used ({reason}); choose auto, cpu, or cuda where"
            " there is a GPU."
        ) from error
