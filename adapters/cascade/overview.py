"""The table that shows a loaded cascade's parts."""

import html
from collections.abc import Mapping, Sequence
from itertools import chain

from diffusers import DiffusionPipeline, ModelMixin
from transformers import PreTrainedModel

from adapters.base.source import GUARDS
from adapters.merging.in_place import MergedAdapters
from unets.frozen import Quantised

COLUMNS = ("", "model", "pictures", "parameters", "precision", "device", "adapters")


def tabulate(
    stages: Mapping[int, DiffusionPipeline],
    text: DiffusionPipeline | None,
    names: Mapping[int, str],
    merged: Mapping[int, MergedAdapters],
) -> list[Sequence[str]]:
    """Make the table's rows: its header, each stage, the text encoder, and the guards."""
    rows: list[Sequence[str]] = [COLUMNS]
    size_px = 0
    for number in (1, 2, 3):
        if number not in stages:
            rows.append([f"Stage {number}", "none"])
            continue
        pipe = stages[number]
        size_px = pipe.vae_scale_factor * size_px if number == 3 else pipe.unet.config.sample_size
        size = [names.get(number, ""), f"{size_px} px"]
        scales = merged[number].scales if number in merged else {}
        added = ", ".join(f"{name} ({scale:g})" for name, scale in scales.items())
        rows.append([f"Stage {number}", *size, *_describe(pipe.unet), added])
    encoder = None if text is None else text.text_encoder
    found = [] if encoder is None else [type(encoder).__name__, "", *_describe(encoder)]
    rows.append(["text encoder", *(found or ["none"])])
    last = stages[max(stages)]
    guards = [name.replace("_", " ") for name in GUARDS if last.components[name] is not None]
    rows.append(["guards", ", ".join(guards) or "none"])
    return rows


def _describe(model: ModelMixin | PreTrainedModel) -> tuple[str, str, str]:
    """Describe a model: the number of its parameters, their precision, and their device."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parameters += sum(layer.shape.numel() for layer in _find_quantised(model))
    device = next(chain(model.parameters(), model.buffers())).device
    return f"{parameters / 1e6:,.1f} M", precision_of(model), str(device)


def precision_of(model: ModelMixin | PreTrainedModel) -> str:
    """Name the precision of a model's weights; if it is quantised, then also that of the others."""
    formats = sorted({layer.format for layer in _find_quantised(model)})
    return " + ".join([*formats, str(model.dtype).removeprefix("torch.")])


def _find_quantised(model: ModelMixin | PreTrainedModel) -> list[Quantised]:
    return [layer for layer in model.modules() if isinstance(layer, Quantised)]


def to_html(rows: Sequence[Sequence[str]]) -> str:
    """Format a table as HTML for a notebook."""
    lines = []
    for row, tag in zip(rows, ["th", *["td"] * len(rows)], strict=False):
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
