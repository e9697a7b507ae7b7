"""Model cards of exported folders, and of models that adapters have been merged into.

Export writes the former; ``python -m adapters.card FOLDER`` rewrites it.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.constants import ENDPOINT
from PIL import Image

from adapters.atomic import write_png, write_text
from adapters.base.hub import is_hub_name, with_revision
from adapters.base.source import PIPELINES, Source
from adapters.files.info import NOTICE, AdapterInfo
from adapters.files.licence import copy_licences, find_copies, is_deepfloyd, licence_files
from adapters.files.places import DIFFUSERS_WEIGHTS
from adapters.files.stage_adapter import StageAdapter
from adapters.pictures.png import Signed
from adapters.tables import format_range
from adapters.weights.kinds import KINDS

CARD = "README.md"

SAMPLES = "samples"

TAGS = ["deepfloyd-if", "text-to-image"]

SETTINGS = ("timesteps", "steps", "guidance", "noise_level")
"""The sampling settings of a stage that a card lists."""

SAMPLE_LINE = re.compile(rf"^!\[(.+)\]\(({SAMPLES}/\d+\.png)\)", re.MULTILINE)
"""A prompt and its picture, as the card shows them."""


def write_card(
    folder: str | Path,
    infos: Sequence[AdapterInfo],
    sample_pictures: Mapping[str, Image.Image] | None = None,
) -> Path:
    """Write ``README.md``, the sample pictures and the base's licence files into an export.

    The folder has ``stage_1``, ``stage_2`` or both in it, which ``infos`` describe; the pictures
    are by prompt. Returns the path of the card.
    """
    folder = Path(folder)
    samples = save_samples(folder, sample_pictures or {})
    licences = {}
    for info in infos:
        copy_licences(info.base_model, info.base_revision, folder, info.stage)
        licences[info.stage] = [path.name for path in find_copies(folder, info.stage)]
    notices = dict.fromkeys(info.licence_notice for info in infos if info.licence_notice)
    links = [
        _link_licence(f" to the Stage {info.stage} adapter", info.base_model, licences[info.stage])
        for info in infos
    ]
    files = [name for names in licences.values() for name in names]
    metadata = _metadata(infos, hub_bases(infos), "adapter", bool(notices), files)
    metadata.tags = [*TAGS, "peft", *sorted({info.spec.kind for info in infos})]
    if samples:
        metadata["widget"] = [{"text": t, "output": {"url": url}} for url, t in samples.items()]
    sections = {
        "Use": "\n\n".join([_use_here(infos), *map(_use_diffusers, infos)]),
        "Prompts": _list_prompts(infos),
        "Samples": "\n\n".join(f"![{text}]({name}) {text}" for name, text in samples.items()),
        "Licence": "\n\n".join([*notices, *links]),
    }
    title = f"{' and '.join(f'Stage {info.stage}' for info in infos)} adapter for DeepFloyd IF"
    choices = [f"Stage {i.stage}: {i.choice}" for i in infos if i.choice]
    card = folder / CARD
    write_text(card, _compose(metadata, title, [_table_of_stages(infos), *choices], sections))
    return card


def merged_card(
    source: Source, adapters: Sequence[tuple[StageAdapter, float]], variant: str | None
) -> str:
    """Compose the card of a merged model: its base, adapters and scales, its use, its licence."""
    infos = [adapter.info for adapter, _ in adapters if adapter.info is not None]
    deepfloyd = is_deepfloyd(source.name, source.revision)
    licences = [path.name for path in licence_files(source.name, source.revision)]
    pipeline = PIPELINES[source.stage]
    options = f', variant="{variant}"' if variant else ""
    bases = [source.name] if is_hub_name(source.name) else []
    metadata = _metadata(infos, bases, "merge", deepfloyd, licences)
    sections = {
        "Use": "The folder of this file is a complete model:\n\n"
        f"```python\nfrom diffusers import {pipeline}\n\n"
        f'pipe = {pipeline}.from_pretrained("."{options})\n```',
        "Prompts": _list_prompts(infos),
        "Licence": f"{NOTICE}\n\n" * deepfloyd + _link_licence("", source.name, licences),
    }
    intro = [f"{_name_base(source.name, source.revision)} and:", _table_of_merged(adapters)]
    title = f"Stage {source.stage} of DeepFloyd IF with adapters merged"
    return _compose(metadata, title, intro, sections)


def _compose(
    metadata: ModelCardData, title: str, intro: Sequence[str], sections: Mapping[str, str]
) -> str:
    """Compose a card; empty sections are left out."""
    texts = [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join([f"---\n{metadata}\n---", f"# {title}", *intro, *texts]) + "\n"


def hub_bases(infos: Sequence[AdapterInfo]) -> list[str]:
    """List the adapters' bases that are on the hub, each once: the ``base_model`` of their card."""
    return list(dict.fromkeys(i.base_model for i in infos if is_hub_name(i.base_model)))


def _metadata(
    infos: Sequence[AdapterInfo],
    bases: list[str],
    relation: str,
    deepfloyd: bool,
    licences: Sequence[str],
) -> ModelCardData:
    """Build a card's metadata, in the Hugging Face hub's terms."""
    link = None if deepfloyd else next(iter([*licences, *map(_base_page, bases)]), None)
    return ModelCardData(
        license="deepfloyd-if-license" if deepfloyd else "other",  # the hub's name for it
        license_name="license-of-the-base-model" if link else None,
        license_link=link,
        base_model=bases or None,
        base_model_relation=relation if bases else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=TAGS,
        instance_prompt=next(iter(_prompts(infos)), None),
    )


def _table_of_stages(infos: Sequence[AdapterInfo]) -> str:
    rows = []
    for info in infos:
        spec, base = info.spec, _name_base(info.base_model, info.base_revision)
        targets = spec.targets if isinstance(spec.targets, str) else ", ".join(spec.targets)
        alpha = f"{spec.alpha or spec.rank:g}"
        rows.append([info.stage, base, spec.kind, spec.rank, alpha, f"`{targets}`", info.step])
    return _table("stage base kind rank alpha targets steps", rows)


def _table_of_merged(adapters: Sequence[tuple[StageAdapter, float]]) -> str:
    rows = []
    for adapter, scale in adapters:
        rank, alpha = (format_range(own.values()) for own in (adapter.ranks, adapter.alphas))
        steps = adapter.info.step if adapter.info else ""
        path = adapter.folder.resolve()
        name = path.name if adapter.info is None else f"{path.parent.name}/{path.name}"
        rows.append([f"`{name}`", adapter.kind, rank, alpha, f"{scale:g}", steps])
    return _table("adapter kind rank alpha scale steps", rows)


def _table(header: str, rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table in Markdown, from the words of its header and its rows."""
    names = header.split()
    lines = [names, *rows]
    texts = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([texts[0], "|---" * len(names) + "|", *texts[1:]])


def _name_base(base_model: str, revision: str | None) -> str:
    return f"`{base_model}`" + f" at `{revision}`" * bool(revision)


def _prompts(infos: Sequence[AdapterInfo]) -> list[str]:
    """List the prompts of all adapters, each once."""
    return list(dict.fromkeys(prompt for info in infos for prompt in info.prompts))


def _list_prompts(infos: Sequence[AdapterInfo]) -> str:
    return "\n".join(f"- `{prompt}`" for prompt in _prompts(infos))


def _use_here(infos: Sequence[AdapterInfo]) -> str:
    """Explain how to load adapters with this toolkit."""
    bases = {info.stage: with_revision(info.base_model, info.base_revision) for info in infos}
    names = ", ".join(f'stage_{stage}="{base}"' for stage, base in bases.items())
    prompt = json.dumps(next(iter(_prompts(infos)), ""), ensure_ascii=False)  # quotes and all
    low_res = "" if 1 in bases else ', low_res="picture_of_stage_1.png"'
    sampling = ', sampling="as_trained"' if any(info.sampling for info in infos) else ""
    return (
        "With this toolkit, from the folder of this file or by its name on the hub, `owner/name`"
        " (any kind, all stages, merged):\n\n"
        "```python\nfrom adapters import load_cascade\n\n"
        f'cascade = load_cascade({names}, adapters=["."])\n'
        f"pictures = cascade({prompt}{low_res}, seed=0{sampling}).final\n```"
        + _list_settings(infos)
    )


def _list_settings(infos: Sequence[AdapterInfo]) -> str:
    """List the settings that adapters were validated with; empty if they record none."""
    rows = [
        [
            info.stage,
            *(_format(info.sampling.get(f"stage_{info.stage}", {}).get(name)) for name in SETTINGS),
        ]
        for info in infos
        if info.sampling
    ]
    if not rows:
        return ""
    table = _table(" ".join(["stage", *SETTINGS]), rows)
    return f"\n\n`as_trained` stands for the settings of its training's validation:\n\n{table}"


def _format(value: float | str | None) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, int | float) else value


def _use_diffusers(info: AdapterInfo) -> str:
    """Explain how to load a stage, or its approximation, with plain diffusers."""
    pipeline = PIPELINES[info.stage]
    revision = f', revision="{info.base_revision}"' * bool(info.base_revision)
    kind, caution = info.spec.kind, ""
    if KINDS[kind].alone:
        caution = (
            f" It loads a single adapter of kind `{kind}` exactly, but for this kind it supports"
            " neither mixing by `set_adapters` nor swapping by `hotswap=True`."
            " The cascade above mixes it exactly."
        )
    elif not KINDS[kind].has_b:
        caution = (
            f" It cannot load adapters of kind `{kind}`, so it gets a LoRA that approximates it;"
            f" `python -m adapters.inspect stage_{info.stage}/{DIFFUSERS_WEIGHTS}` shows its error."
            " PEFT loads the adapter itself, with"
            f' `PeftModel.from_pretrained(pipe.unet, "stage_{info.stage}")`.'
        )
    return (
        f"Stage {info.stage} with diffusers alone.{caution}\n\n"
        f"```python\nfrom diffusers import {pipeline}\n\n"
        f'pipe = {pipeline}.from_pretrained("{info.base_model}"{revision})\n'
        f'pipe.load_lora_weights("stage_{info.stage}")\n{_call_pipeline(info)}```'
    )


def _call_pipeline(info: AdapterInfo) -> str:
    """Write the call that draws as trained, as the last line of a snippet; empty if not known."""
    own = (info.sampling or {}).get(f"stage_{info.stage}")
    if own is None:
        return ""
    given: dict[str, object]
    if own.get("timesteps"):
        given = {"timesteps": f"timesteps.{own['timesteps']}_timesteps"}
    else:
        given = {"num_inference_steps": own.get("steps")}
    given |= {"guidance_scale": own.get("guidance"), "noise_level": own.get("noise_level")}
    texts = [json.dumps(next(iter(info.prompts), ""), ensure_ascii=False)]
    texts += ["image=pictures_of_stage_1"] * (info.stage > 1)
    texts += [f"{name}={value}" for name, value in given.items() if value is not None]
    imported = "from diffusers.pipelines.deepfloyd_if import timesteps\n" * ("timesteps" in given)
    return f"{imported}pictures = pipe({', '.join(texts)}).images\n"


def _link_licence(subject: str, base_model: str, files: Sequence[str]) -> str:
    """Link to the licence files of a base, or else to the base's page."""
    base = f"`{base_model}`"
    if is_hub_name(base_model):
        base = f"[{base_model}]({_base_page(base_model)})"
    links = ", ".join(f"[{name}]({name})" for name in files)
    return f"The licence of its base model applies{subject}: {links or base}"


def _base_page(base_model: str) -> str:
    return f"{ENDPOINT}/{base_model}"


def save_samples(folder: Path, pictures: Mapping[str, Image.Image]) -> dict[str, str]:
    """Replace the sample pictures in a folder, and return their prompts by file."""
    shutil.rmtree(folder / SAMPLES, ignore_errors=True)
    samples = {}
    for index, (prompt, picture) in enumerate(pictures.items()):
        name = f"{SAMPLES}/{index:02d}.png"
        write_png(folder / name, picture)
        samples[name] = prompt
    return samples


def load_samples(folder: Path) -> dict[str, Image.Image]:
    """Load the sample pictures that a folder's card shows, by prompt; none without a card.

    Each picture keeps the PNG texts of its file.
    """
    card, samples = folder / CARD, dict[str, Image.Image]()
    if card.is_file():
        for name, prompt in parse_samples(card.read_text(encoding="utf-8")).items():
            if (folder / name).is_file():
                with Image.open(folder / name) as picture:
                    samples[prompt] = Signed.of(picture, {})
    return samples


def parse_samples(card: str) -> dict[str, str]:
    """Parse the prompts of the sample pictures in a card's text, by file."""
    return {name: prompt for prompt, name in SAMPLE_LINE.findall(card)}
