"""The card of a model that adapters have been merged into."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from adapters.base.source import PIPELINES, Source
from adapters.files.info import NOTICE
from adapters.files.licence import is_deepfloyd, licence_files
from adapters.files.model_card import linked_base
from adapters.files.reading import alpha_of, kind_of, rank_of
from adapters.files.stage_adapter import StageAdapter
from adapters.tables import format_range

CARD = "README.md"


def merged_card(
    source: Source, adapters: Sequence[tuple[StageAdapter, float]], variant: str | None
) -> str:
    """What a merged model is, how to load it, and its licence.

    Args:
        source: the base.
        adapters: what was merged, and how much of each.
        variant: that of its UNet's files.
    """
    pipeline = PIPELINES[source.stage]
    options = f', variant="{variant}"' if variant else ""
    infos = [adapter.info for adapter, _ in adapters if adapter.info is not None]
    prompts = dict.fromkeys(prompt for info in infos for prompt in info.prompts)
    deepfloyd = is_deepfloyd(source.name, source.revision)
    files = [path.name for path in licence_files(source.name, source.revision)]
    links = ", ".join(f"[{name}]({name})" for name in files)
    parts = [
        f"---\n{front_matter(source, deepfloyd)}---",
        f"# Stage {source.stage} of DeepFloyd IF with adapters merged",
        f"`{source.name}`" + f" at `{source.revision}`" * bool(source.revision) + " and:",
        table(adapters),
        "## Use",
        "The folder of this file is a complete model:\n\n"
        f"```python\nfrom diffusers import {pipeline}\n\n"
        f'pipe = {pipeline}.from_pretrained("."{options})\n```',
        "## Prompts" if prompts else "",
        "\n".join(f"- `{prompt}`" for prompt in prompts),
        "## Licence",
        NOTICE if deepfloyd else "",
        f"The licence of its base model applies: {links or linked_base(source.name)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(source: Source, deepfloyd: bool) -> str:
    """The card's metadata, in the Hugging Face hub's terms."""
    hub = not Path(source.name).exists()
    base = {"base_model": source.name, "base_model_relation": "merge"} if hub else {}
    own = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "deepfloyd-if-license" if deepfloyd else "other",
        "tags": ["deepfloyd-if", "text-to-image"],
    }
    return yaml.safe_dump(base | own, sort_keys=False)


def table(adapters: Sequence[tuple[StageAdapter, float]]) -> str:
    """One row an adapter."""
    rows = ["| adapter | kind | rank | alpha | scale | steps |", "|---|---|---|---|---|---|"]
    for adapter, scale in adapters:
        config, modules = adapter.config, adapter.modules
        rank = format_range(rank_of(config, name) for name in modules)
        alpha = format_range(alpha_of(config, name) for name in modules)
        steps = adapter.info.step if adapter.info else ""
        name = adapter.folder.resolve()
        place = name.name if adapter.info is None else f"{name.parent.name}/{name.name}"
        rows.append(f"| `{place}` | {kind_of(config)} | {rank} | {alpha} | {scale:g} | {steps} |")
    return "\n".join(rows)
