"""Whatever is changed in a file of others: its reader returns a value, or says what is wrong."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import Sampling, UserError, load_embeds, read_picture_info, save_embeds
from adapters.base.stored_unet import StoredUNet
from adapters.cascade.provenance import PictureInfo, UsedAdapter
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.random_cascade import RandomCascade

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

few = settings(
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\0", "(", "(a+)+$", ".*", "../..", "/", "~", "\x1b[2J", "1" * 5000])
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)

edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
"""Bytes that are changed, at shares of the length of what they are in."""

cuts = st.none() | st.floats(0, 1)
"""The share of a file that is left; ``None``: all."""


@pytest.fixture(scope="module")
def stage(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, spec = random_cascade.stage_1, AdapterSpec(rank=2, alpha=3.0)
    return export(trained_unet(base, spec), tmp_path_factory.mktemp("dog"), base, 1, spec).folder


@pytest.fixture(scope="module")
def unet(random_cascade: RandomCascade) -> StoredUNet:
    return StoredUNet.find(str(random_cascade.stage_1 / "unet"))


@contextmanager
def copied(stage: Path) -> Iterator[Path]:
    """A copy of a folder for one example."""
    with tempfile.TemporaryDirectory() as root:
        yield Path(shutil.copytree(stage, Path(root) / "stage_1"))


def read_or_refuse(read: Callable[[], object]) -> None:
    """Read a file; nothing but a UserError may be raised, and nothing be warned of."""
    with warnings.catch_warnings(action="error", category=UserWarning), suppress(UserError):
        read()


def use(folder: Path, unet: StoredUNet) -> None:
    """Read an adapter, and all that is asked of one before it is merged."""
    for adapter in StageAdapter.load_all(folder):
        adapter.stage_among({1: unet.unet.config})
        adapter.check_base(unet.signature, unet.name)
        for name in list(adapter.modules)[:2]:
            adapter.update(name, unet.read(f"{name}.weight"))


def change_bytes(content: bytes, edits: list[tuple[float, int]], cut: float | None) -> bytes:
    changed = bytearray(content)
    for share, value in edits:
        changed[int(share * (len(changed) - 1))] = value
    return bytes(changed if cut is None else changed[: int(cut * len(changed))])


def put(tree: Any, path: list[int], value: Any) -> Any:
    """Put a value in the place of one within a tree, which a list of numbers leads to."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[path[0] % len(keys)]
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    changed[key] = put(tree[key], path[1:], value)
    return changed


places = st.lists(st.integers(0, 50), min_size=1, max_size=3)


@few
@given(edits, cuts)
def test_the_weights_of_an_adapter(
    stage: Path, unet: StoredUNet, edits: list[tuple[float, int]], cut: float | None
) -> None:
    content = (stage / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    with copied(stage) as folder:
        changed = change_bytes(content[:header], edits, None) + content[header:]
        changed = changed if cut is None else changed[: int(cut * len(changed))]
        (folder / WEIGHTS).write_bytes(changed)
        read_or_refuse(lambda: use(folder, unet))


@few
@given(places, trees)
def test_the_header_of_a_file(stage: Path, unet: StoredUNet, place: list[int], value: Any) -> None:
    content = (stage / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    tree = put(json.loads(content[8 : 8 + size]), place, value)
    text = json.dumps(tree).encode(errors="surrogatepass")
    with copied(stage) as folder:
        changed = len(text).to_bytes(8, "little") + text + content[8 + size :]
        (folder / WEIGHTS).write_bytes(changed)
        read_or_refuse(lambda: use(folder, unet))


@few
@given(st.dictionaries(st.integers(0, 60) | st.text(max_size=5), trees, min_size=1, max_size=2))
def test_a_configuration(stage: Path, unet: StoredUNet, changes: dict[int | str, Any]) -> None:
    own = json.loads((stage / CONFIG).read_text())
    names = sorted(own)
    named = {n if isinstance(n, str) else names[n % len(names)]: v for n, v in changes.items()}
    with copied(stage) as folder:
        found = load_file(folder / WEIGHTS)
        save_file(found, folder / WEIGHTS)  # without its header, so that names and shapes count
        (folder / CONFIG).write_text(json.dumps(own | named))
        read_or_refuse(lambda: use(folder, unet))


@few
@given(edits, cuts)
def test_the_bytes_of_a_configuration(
    stage: Path, unet: StoredUNet, edits: list[tuple[float, int]], cut: float | None
) -> None:
    with copied(stage) as folder:
        content = (folder / CONFIG).read_bytes()
        (folder / CONFIG).write_bytes(change_bytes(content, edits, cut))
        read_or_refuse(lambda: use(folder, unet))


@few
@given(places, trees)
def test_what_an_export_says_of_itself(
    stage: Path, unet: StoredUNet, place: list[int], value: Any
) -> None:
    with safe_open(stage / WEIGHTS, "pt") as opened:
        own = json.loads(opened.metadata()["if_adapter"])
    with copied(stage) as folder:
        (folder / CONFIG).unlink()
        said = json.dumps(put(own, place, value))
        save_file(load_file(stage / WEIGHTS), folder / WEIGHTS, metadata={"if_adapter": said})
        read_or_refuse(lambda: use(folder, unet))


RECORD = PictureInfo(
    stage=2,
    prompts={1: "a cat", 2: "a cat"},
    models={1: "x/y", 2: "x/z"},
    precisions={1: "float32", 2: "float32"},
    adapters={"dog": UsedAdapter(source="dog", scales={1: 0.5, 2: 1.0})},
    sampling=Sampling(),
).model_dump(mode="json")


def write_png(path: Path, text: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("if_picture", text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=chunks)


@few
@given(places, trees)
def test_the_record_of_a_picture(place: list[int], value: Any) -> None:
    text = json.dumps(put(RECORD, place, value))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.png"
        write_png(file, text)
        read_or_refuse(lambda: read_picture_info(file))


@few
@given(edits, cuts)
def test_the_bytes_of_a_picture(edits: list[tuple[float, int]], cut: float | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.png"
        write_png(file, json.dumps(RECORD))
        file.write_bytes(change_bytes(file.read_bytes(), edits, cut))
        read_or_refuse(lambda: read_picture_info(file))


@few
@given(edits, cuts, st.none() | trees)
def test_encodings(edits: list[tuple[float, int]], cut: float | None, prompts: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        save_embeds(file, ["a", ""], torch.ones(2, 3, 4))
        if prompts is None:
            file.write_bytes(change_bytes(file.read_bytes(), edits, cut))
        else:
            found = {"prompt_embeds": torch.ones(2, 3, 4)}
            save_file(found, file, metadata={"prompts": json.dumps(prompts)})
        read_or_refuse(lambda: load_embeds(file))
