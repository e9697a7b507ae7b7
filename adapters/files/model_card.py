"""The model card of an exported folder: what it is, how to load it, what it draws, its licence.

Export writes it; ``python -m adapters.card FOLDER`` writes it anew.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCardData
from huggingface_hub.constants import ENDPOINT
from PIL import Image

from adapters.atomic import write_png, write_text
from adapters.base.hub import is_hub_name, with_revision
from adapters.base.source import PIPELINES
from adapters.files.info import AdapterInfo
from adapters.files.licence import copy_licences, handed_on
from adapters.pictures.png import Signed
from adapters.weights.kinds import KINDS, diffusers_loads

CARD = "README.md"

SAMPLES = "samples"

SAMPLE_LINE = re.compile(rf"^!\[(.+)\]\(({SAMPLES}/\d+\.png)\)", re.MULTILINE)
"""A prompt and its picture, as the card shows them."""


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
    for info in infos:
        copy_licences(info.base_model, info.base_revision, folder, info.stage)
    licences = [[path.name for path in handed_on(folder, info.stage)] for info in infos]
    parts = [
        f"---\n{front_matter(infos, licences, samples)}\n---",
        f"# {' and '.join(f'Stage {info.stage}' for info in infos)} adapter for DeepFloyd IF",
        table(infos),
        "## Use",
        ours(infos),
        *(with_diffusers(info) for info in infos),
        "## Prompts",
        "\n".join(f"- `{prompt}`" for prompt in prompts(infos)),
        "## Samples" if samples else "",
        "\n\n".join(f"![{prompt}]({name}) {prompt}" for name, prompt in samples.items()),
        "## Licence",
        licence(infos, licences),
    ]
    card = folder / CARD
    write_text(card, "\n\n".join(part for part in parts if part) + "\n")
    return card


def front_matter(
    infos: Sequence[AdapterInfo],
    licences: Sequence[Sequence[str]] = (),
    samples: Mapping[str, str] | None = None,
) -> ModelCardData:
    """The card's metadata, in the Hugging Face hub's terms.

    Args:
        infos: what the adapters say of themselves.
        licences: the licence files of each.
        samples: the prompts of sample pictures, by file.
    """
    bases = list(dict.fromkeys(i.base_model for i in infos if is_hub_name(i.base_model)))
    deepfloyd = any(info.licence_notice for info in infos)
    links = [name for names in licences for name in names] + [base_page(base) for base in bases]
    link = None if deepfloyd else next(iter(links), None)
    return ModelCardData(
        license="deepfloyd-if-license" if deepfloyd else "other",  # the hub's name for it
        license_name="license-of-the-base-model" if link else None,
        license_link=link,
        base_model=bases or None,
        base_model_relation="adapter" if bases else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["deepfloyd-if", "text-to-image", "peft", *sorted({i.spec.kind for i in infos})],
        instance_prompt=next(iter(prompts(infos)), None),
        widget=[{"text": text, "output": {"url": url}} for url, text in (samples or {}).items()]
        or None,
    )


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
    bases = {info.stage: with_revision(info.base_model, info.base_revision) for info in infos}
    names = ", ".join(f'stage_{stage}="{base}"' for stage, base in bases.items())
    prompt = next(iter(prompts(infos)), "")
    return (
        "With this toolkit, from the folder of this file or by its name on the hub, `owner/name`"
        " (any kind, all stages, merged):\n\n"
        "```python\nfrom adapters import load_cascade\n\n"
        f'cascade = load_cascade({names}, adapters=["."])\n'
        f'pictures = cascade("{prompt}", seed=0).final\n```'
    )


def with_diffusers(info: AdapterInfo) -> str:
    """How plain diffusers loads a stage, or its approximation."""
    pipeline = PIPELINES[info.stage]
    revision = f', revision="{info.base_revision}"' * bool(info.base_revision)
    return (
        f"Stage {info.stage} with diffusers alone.{caution(info)}\n\n"
        f"```python\nfrom diffusers import {pipeline}\n\n"
        f'pipe = {pipeline}.from_pretrained("{info.base_model}"{revision})\n'
        f'pipe.load_lora_weights("stage_{info.stage}")\n```'
    )


def caution(info: AdapterInfo) -> str:
    """What plain diffusers cannot do with an adapter, and what can; empty where it can all."""
    kind = info.spec.kind
    if KINDS[kind].alone:
        return (
            f" It loads an adapter of kind `{kind}` exactly where that is alone; mixing several by"
            " `set_adapters` and swapping by `hotswap=True` are not supported there for this kind,"
            " while the cascade above mixes it exactly."
        )
    if diffusers_loads(info.spec):
        return ""
    return (
        f" It cannot load adapters of kind `{kind}`: what it gets is an approximation as a LoRA,"
        f" whose error `python -m adapters.inspect stage_{info.stage}/{LORA_WEIGHT_NAME_SAFE}`"
        " tells. PEFT loads the adapter itself, with"
        f' `PeftModel.from_pretrained(pipe.unet, "stage_{info.stage}")`.'
    )


def save_samples(folder: Path, pictures: Mapping[str, Image.Image]) -> dict[str, str]:
    """Write the sample pictures anew; returns their prompts by file."""
    shutil.rmtree(folder / SAMPLES, ignore_errors=True)
    samples = {}
    for index, (prompt, picture) in enumerate(pictures.items()):
        name = f"{SAMPLES}/{index:02d}.png"
        write_png(folder / name, picture)
        samples[name] = prompt
    return samples


def samples_of(folder: Path) -> dict[str, Image.Image]:
    """The sample pictures that a folder's card shows, by prompt; none without a card."""
    card = folder / CARD
    samples = shown(card.read_text(encoding="utf-8")) if card.is_file() else {}
    present = {prompt: folder / name for name, prompt in samples.items()}
    return {prompt: _read(path) for prompt, path in present.items() if path.is_file()}


def _read(path: Path) -> Image.Image:
    """A sample picture, with what its file says of it."""
    with Image.open(path) as picture:
        return Signed.of(picture, {})


def shown(card: str) -> dict[str, str]:
    """The prompts of the sample pictures in a card's text, by file."""
    return {name: prompt for prompt, name in SAMPLE_LINE.findall(card)}


def licence(infos: Sequence[AdapterInfo], files: Sequence[Sequence[str]]) -> str:
    """What the bases' licences ask for; ``files`` are those of each stage."""
    notices = dict.fromkeys(info.licence_notice for info in infos if info.licence_notice)
    lines = [
        f"The licence of its base model applies to the Stage {info.stage} adapter: "
        + (", ".join(f"[{name}]({name})" for name in names) or linked_base(info.base_model))
        for info, names in zip(infos, files, strict=True)
    ]
    return "\n\n".join([*notices, *lines])


def linked_base(base_model: str) -> str:
    """A base, and where it is to be found: its licence is there when its files are not at hand."""
    hub = is_hub_name(base_model)
    return f"[{base_model}]({base_page(base_model)})" if hub else f"`{base_model}`"


def base_page(base_model: str) -> str:
    """The page of a base on the hub."""
    return f"{ENDPOINT}/{base_model}"
