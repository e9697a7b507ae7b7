"""The model card of an exported folder: what it is, how to load it, what it draws, its licence."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub.constants import ENDPOINT
from PIL import Image

from adapters.bases import PIPELINES
from adapters.files import replacing, write_text
from adapters.info import AdapterInfo
from adapters.kinds import diffusers_loads
from adapters.licence import copy_licences

SAMPLES = "samples"


def write_card(
    folder: str | Path,
    infos: Sequence[AdapterInfo],
    sample_pictures: Mapping[str, Image.Image] | None = None,
) -> Path:
    """Write ``README.md``, the sample pictures and the base's licence files into an export.

    Args:
        folder: the folder with ``stage_1``, ``stage_2`` or both in it.
        infos: what its adapters say of themselves, by stage.
        sample_pictures: pictures that the fine-tuned cascade has drawn, by prompt.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    samples = save_samples(folder, sample_pictures or {})
    copied = (copy_licences(i.base_model, i.base_revision, folder, i.stage) for i in infos)
    licences = [[path.name for path in paths] for paths in copied]
    parts = [
        f"---\n{yaml.safe_dump(front_matter(infos), sort_keys=False)}---",
        f"# {' and '.join(f'Stage {info.stage}' for info in infos)} adapter for DeepFloyd IF",
        table(infos),
        "## Use",
        ours(infos),
        *(with_diffusers(info) for info in infos),
        "## Prompts",
        "\n".join(f"- `{prompt}`" for prompt in prompts(infos)),
        *samples,
        "## Licence",
        licence(infos, licences),
    ]
    card = folder / "README.md"
    write_text(card, "\n\n".join(part for part in parts if part) + "\n")
    return card


def front_matter(infos: Sequence[AdapterInfo]) -> dict[str, Any]:
    """The card's metadata, in the Hugging Face hub's terms."""
    hub_names = list(
        dict.fromkeys(info.base_model for info in infos if not Path(info.base_model).exists())
    )
    deepfloyd = any(info.licence_notice for info in infos)
    matter: dict[str, Any] = {"base_model": hub_names} if hub_names else {}
    return matter | {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "deepfloyd-if-license" if deepfloyd else "other",
        "tags": ["deepfloyd-if", "text-to-image", "peft", *sorted({i.spec.kind for i in infos})],
    }


def table(infos: Sequence[AdapterInfo]) -> str:
    """One row a stage."""
    rows = [
        "| stage | base | kind | rank | alpha | targets | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for info in infos:
        base = f"`{info.base_model}`" + (f" at `{info.base_revision}`" * bool(info.base_revision))
        spec = info.spec
        targets = spec.targets if isinstance(spec.targets, str) else ", ".join(spec.targets)
        rows.append(
            f"| {info.stage} | {base} | {spec.kind} | {spec.rank} | {spec.alpha or spec.rank:g} |"
            f" `{targets}` | {info.step} |"
        )
    return "\n".join(rows)


def prompts(infos: Sequence[AdapterInfo]) -> list[str]:
    """The prompts of all stages, each once."""
    return list(dict.fromkeys(prompt for info in infos for prompt in info.prompts))


def ours(infos: Sequence[AdapterInfo]) -> str:
    """How this toolkit loads it."""
    names = ", ".join(f'stage_{info.stage}="{info.base_model}"' for info in infos)
    prompt = next(iter(prompts(infos)), "")
    return (
        "With this toolkit, from the folder of this file (any kind, all stages, merged):\n\n"
        "```python\nfrom adapters import load_cascade\n\n"
        f'cascade = load_cascade({names}, adapters=["."])\n'
        f'pictures = cascade("{prompt}", seed=0).final\n```'
    )


def with_diffusers(info: AdapterInfo) -> str:
    """How plain diffusers loads a stage, or its approximation."""
    pipeline = PIPELINES[info.stage].__name__
    caution = (
        ""
        if diffusers_loads(info.spec)
        else (
            f" It cannot load adapters of kind `{info.spec.kind}`: what it gets is an approximation"
            " as a LoRA, whose error `python -m adapters.inspect"
            f" stage_{info.stage}/{LORA_WEIGHT_NAME_SAFE}` tells. PEFT loads the adapter"
            f' itself, with `PeftModel.from_pretrained(pipe.unet, "stage_{info.stage}")`.'
        )
    )
    return (
        f"Stage {info.stage} with diffusers alone.{caution}\n\n"
        f"```python\nfrom diffusers import {pipeline}\n\n"
        f'pipe = {pipeline}.from_pretrained("{info.base_model}")\n'
        f'pipe.load_lora_weights("stage_{info.stage}")\n```'
    )


def save_samples(folder: Path, pictures: Mapping[str, Image.Image]) -> list[str]:
    """Write the sample pictures anew, and return the card's section on them."""
    shutil.rmtree(folder / SAMPLES, ignore_errors=True)
    lines = []
    for index, (prompt, picture) in enumerate(pictures.items()):
        name = f"{SAMPLES}/{index:02d}.png"
        with replacing(folder / name) as temporary:
            picture.save(temporary, format="PNG")
        lines.append(f"![{prompt}]({name}) {prompt}")
    return ["## Samples", "\n\n".join(lines)] if lines else []


def licence(infos: Sequence[AdapterInfo], files: Sequence[Sequence[str]]) -> str:
    """What the bases' licences ask for; ``files`` are those of each stage."""
    notices = dict.fromkeys(info.licence_notice for info in infos if info.licence_notice)
    lines = [
        f"The licence of its base model applies to the Stage {info.stage} adapter: "
        + (", ".join(f"[{name}]({name})" for name in names) or base_page(info.base_model))
        for info, names in zip(infos, files, strict=True)
    ]
    return "\n\n".join([*notices, *lines])


def base_page(base_model: str) -> str:
    """Where a base's licence is to be found when its files are not at hand."""
    hub = not Path(base_model).exists()
    return f"[{base_model}]({ENDPOINT}/{base_model})" if hub else f"`{base_model}`"
