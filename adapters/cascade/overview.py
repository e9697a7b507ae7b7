"""What a loaded cascade is made of, as a table for people: as text, and as HTML for notebooks."""

import html
from collections.abc import Mapping, Sequence
from itertools import chain

from diffusers import DiffusionPipeline, ModelMixin
from transformers import PreTrainedModel

from adapters.base.source import GUARDS
from adapters.merging.in_place import MergedAdapters
from unets.frozen import Quantised

COLUMNS = ("", "model", "pictures", "parameters", "precision", "device", "adapters")


def overview(
    stages: Mapping[int, DiffusionPipeline],
    text: DiffusionPipeline | None,
    names: Mapping[int, str],
    merged: Mapping[int, MergedAdapters],
) -> list[Sequence[str]]:
    """The table's rows: its head, each stage, the text encoder, and what guards the pictures.

    Args:
        stages: the pipelines of the stages that are loaded, by number.
        text: the pipeline with the text encoder, if any.
        names: the models' names, by stage.
        merged: the adapters, by stage.
    """
    rows: list[Sequence[str]] = [COLUMNS]
    size_px = 0
    for number in (1, 2, 3):
        if number not in stages:
            rows.append([f"Stage {number}", "none"])
            continue
        pipe = stages[number]
        size_px = pipe.vae_scale_factor * size_px if number == 3 else pipe.unet.config.sample_size
        size = [names.get(number, ""), f"{size_px} px"]
        added = adapter_names(merged[number]) if number in merged else ""
        rows.append([f"Stage {number}", *size, *described(pipe.unet), added])
    encoder = None if text is None else text.text_encoder
    found = [] if encoder is None else [type(encoder).__name__, "", *described(encoder)]
    rows.append(["text encoder", *(found or ["none"])])
    last = stages[max(stages)]
    guards = [name.replace("_", " ") for name in GUARDS if last.components[name] is not None]
    rows.append(["guards", ", ".join(guards) or "none"])
    return rows


def described(model: ModelMixin | PreTrainedModel) -> tuple[str, str, str]:
    """How many parameters a model has, their precision, and their device."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parameters += sum(layer.shape.numel() for layer in quantised(model))
    device = next(chain(model.parameters(), model.buffers())).device
    return f"{parameters / 1e6:,.1f} M", precision_of(model), str(device)


def precision_of(model: ModelMixin | PreTrainedModel) -> str:
    """The precision of a model's weights; of a quantised one, then that of those which are not."""
    formats = sorted({layer.format for layer in quantised(model)})
    return " + ".join([*formats, str(model.dtype).removeprefix("torch.")])


def quantised(model: ModelMixin | PreTrainedModel) -> list[Quantised]:
    """A model's quantised layers."""
    return [layer for layer in model.modules() if isinstance(layer, Quantised)]


def adapter_names(merged: MergedAdapters) -> str:
    """The adapters that are merged into a stage, and how much of each."""
    return ", ".join(f"{name} ({merged.scales[name]:g})" for name in merged.adapters)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """A table in aligned columns."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_html(rows: Sequence[Sequence[str]]) -> str:
    """A table for a notebook."""
    lines = []
    for row, tag in zip(rows, ["th", *["td"] * len(rows)], strict=False):
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
