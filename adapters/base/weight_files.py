"""Files of weights by their names: of a component's files, those that are read."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from adapters.errors import listed

WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"(\.(?P<variant>[\w-]+?))?"
    r"(-(?P<number>\d{5})-of-(?P<total>\d{5}))?"
    r"(\.(?P<old_variant>[\w-]+))?"
    r"\.(?P<format>safetensors|bin)"
)
"""Names of weights as diffusers and transformers write them: ``model.fp16.safetensors``,
``model.fp16-00001-of-00002.safetensors``, formerly ``model-00001-of-00002.fp16.safetensors``.
Each shard says how many there are, so their index, whose name has varied too, is not needed."""


class Form(NamedTuple):
    """A way of storing weights; the preferred form sorts first."""

    is_plain: bool
    """True if the weights lack the requested variant."""
    is_pickled: bool
    shards: int
    has_old_names: bool
    """True if the variant stands at the end of the shards' names."""
    stem: str


def choose_weights(
    component: str, names: Iterable[str], variant: str | None
) -> tuple[list[str], Form]:
    """Choose from the names of a component's files those of its weights, in the order of shards.

    Raises:
        FileNotFoundError: if there are neither weights of the variant nor plain ones, or a shard is
            missing.
        ValueError: if two complete sets lie side by side.
    """
    sets: dict[Form, dict[int, str]] = defaultdict(dict)
    others = set()
    for match in filter(None, map(WEIGHTS.fullmatch, sorted(names))):
        own, old = match["variant"] or match["old_variant"], bool(match["old_variant"])
        if own not in (variant, None):
            others.add(own)
            continue
        pickled, shards = match["format"] == "bin", int(match["total"] or 1)
        form = Form(own != variant, pickled, shards, old, match["stem"])
        sets[form][int(match["number"] or 1)] = match[0]
    if not sets:
        only = f"only weights of the variant {listed(sorted(others))}" if others else "no weights"
        raise FileNotFoundError(f"its {component} has {only}")
    missing = {form: sorted({*range(1, form.shards + 1)} - sets[form].keys()) for form in sets}
    best = min(sets, key=lambda form: (form[:2], bool(missing[form]), form))
    files = sets[best]
    if missing[best]:
        raise FileNotFoundError(
            f"of the {best.shards} shards of its {component}, {len(missing[best])} are missing"
            f" (number {listed(map(str, missing[best]))}); there are only {listed(files.values())}"
        )
    for form, rival in sets.items():
        # a whole file is read rather than shards, and newer names rather than old ones
        is_rival = form.shards != best.shards > 1 or form[:4] == best[:4]
        if form[:2] == best[:2] and form != best and not missing[form] and is_rival:
            raise ValueError(
                f"its {component} has two sets of weights, {listed(files.values())} and"
                f" {listed(rival.values())}; remove one of them"
            )
    return [files[number] for number in sorted(files)], best


def link_weights(files: Sequence[Path], folder: Path) -> None:
    """Link safetensors files as one plain file, or as shards and their index."""
    match = WEIGHTS.fullmatch(files[0].name)
    assert match is not None
    # transformers names its pickled files differently from its safetensors files
    stem = "model" if match["stem"] == "pytorch_model" else match["stem"]
    if len(files) == 1:
        (folder / f"{stem}.safetensors").symlink_to(files[0].absolute())
        return
    shard_of: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        shard = f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        (folder / shard).symlink_to(file.absolute())
        with safe_open(file, "pt") as opened:
            shard_of |= dict.fromkeys(opened.keys(), shard)
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
