"""Models load as published: variants or plain, safetensors or pickled, in shards or whole."""

import errno
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.deepfloyd_if import IFWatermarker
from huggingface_hub import close_session, constants
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5EncoderModel

from adapters import Parts, Sampling, StageSampling, load_cascade
from adapters.base.component_files import ModelFiles
from adapters.base.conversion import as_safetensors
from adapters.base.source import Source
from adapters.base.stored_unet import StoredUNet
from adapters.base.weight_files import choose_weights
from adapters.errors import UserError
from adapters.files.export import AdapterInfo, export_adapter
from adapters.merge import main as merge
from adapters.weights.kinds import AdapterSpec, adapter_state, attach
from finetune.data.captions import CaptionCache, embed_captions
from finetune.memory.fit import plan
from finetune.memory.report import format_downloads
from finetune.plan import main
from finetune.recipe.schema import Recipe
from tests.builders.hub_stand_in import HubStandIn, hub_stand_in
from tests.builders.published_layouts import Layout, files_of, rewrite
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import trainee_of

CPU = torch.device("cpu")
TWO = Sampling(stage_1=StageSampling(steps=2), stage_2=StageSampling(steps=2))
GUARDS = ("safety_checker/", "feature_extractor/", "watermarker/")
KINDS = {
    "unet": UNet2DConditionModel,
    "text_encoder": T5EncoderModel,
    "watermarker": IFWatermarker,
}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches of the hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache" / "assets"))


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as hub:
        yield hub


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", "fp16", "model.safetensors"),
        ("model.fp16.safetensors model.safetensors", None, "model.safetensors"),
        ("model.fp16.safetensors model.safetensors", "fp16", "model.fp16.safetensors"),
        ("model.safetensors pytorch_model.bin", None, "model.safetensors"),
        ("model.fp16.safetensors pytorch_model.fp16.bin", "fp16", "model.fp16.safetensors"),
        ("pytorch_model.fp16.bin model.safetensors", "fp16", "pytorch_model.fp16.bin"),
        ("pytorch_model.bin model.fp16.safetensors", None, "pytorch_model.bin"),
        ("model.bf16.safetensors pytorch_model.bin", "fp16", "pytorch_model.bin"),
        ("model.non_ema.safetensors model.safetensors", None, "model.safetensors"),
        (
            "a.safetensors openvino_model.bin model.onnx model.safetensors",
            None,
            "model.safetensors",
        ),
        ("model-#-of-00002.safetensors model.safetensors", None, "model.safetensors"),
        ("model-#-of-00002.safetensors pytorch_model.bin", None, "model-#-of-00002.safetensors"),
        ("model.fp16-#-of-00002.safetensors", "fp16", "model.fp16-#-of-00002.safetensors"),
        ("model-#-of-00002.fp16.safetensors", "fp16", "model-#-of-00002.fp16.safetensors"),
        (
            "model-#-of-00002.fp16.safetensors model.fp16-#-of-00002.safetensors",
            "fp16",
            "model.fp16-#-of-00002.safetensors",
        ),
        (
            "model-00001-of-00003.safetensors model-#-of-00004.safetensors",
            None,
            "model-#-of-00004.safetensors",
        ),
        ("pytorch_model-#-of-00002.bin", "fp16", "pytorch_model-#-of-00002.bin"),
    ],
)
def test_of_what_is_there_the_variant_comes_first_then_safetensors(
    names: str, variant: str | None, chosen: str
) -> None:
    there = files_of(names.split())
    assert choose_weights("unet", there, variant)[0] == sorted(files_of([chosen]))


@pytest.mark.parametrize(
    ("names", "variant", "reason"),
    [
        ("config.json", "fp16", "its unet has no weights"),
        ("model.fp16.safetensors", None, "its unet has only weights of the variant fp16"),
        ("model-00001-of-00003.safetensors", None, "of the 3 shards of its unet, 2 are missing"),
        ("model-00001-of-00002.safetensors pytorch_model.bin", None, "1 are missing"),
        (
            "model-00001-of-00002.safetensors model-00003-of-00002.safetensors",
            None,
            r"1 are missing \(number 2\)",
        ),
        (
            "model.safetensors pytorch_model.safetensors",
            None,
            r"two sets of weights, model\S* and pytorch_model\S*;",
        ),
        ("model.fp16-00001-of-00002.safetensors model.safetensors", "fp16", "1 are missing"),
        (
            "model-#-of-00002.safetensors model-#-of-00004.safetensors",
            None,
            "two sets of weights, .*-of-00002.safetensors and .*-of-00004.safetensors; remove one",
        ),
    ],
)
def test_what_cannot_be_chosen_is_said(names: str, variant: str | None, reason: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=reason):
        choose_weights("unet", files_of(names.split()), variant)


@dataclass(frozen=True)
class Case:
    """A layout, and which of its files are read where fp16 is asked for."""

    layout: Layout
    read: Layout
    stage: int = 1

    @property
    def told(self) -> set[str]:
        """The components that are told to lack the variant."""
        return {part for part, names in self.read.items() if "fp16" not in names[0]}


def both(stem: str) -> list[str]:
    """Plain and in fp16, as safetensors and pickled."""
    pickled = "pytorch_model" if stem == "model" else stem
    ends = ((stem, "safetensors"), (pickled, "bin"))
    return [f"{name}{variant}.{end}" for variant in ("", ".fp16") for name, end in ends]


U, T = "diffusion_pytorch_model", "model"
MAIN = {"unet": both(U), "text_encoder": both(T)}
READ = {"unet": [f"{U}.fp16.safetensors"], "text_encoder": [f"{T}.fp16.safetensors"]}
SHARDS = f"{T}.fp16-#-of-00002.safetensors"
PLAIN_GUARDS = {"safety_checker": [f"{T}.safetensors"], "watermarker": [f"{U}.safetensors"]}
PICKLED_GUARDS = {"safety_checker": ["pytorch_model.bin"], "watermarker": [f"{U}.bin"]}
CASES = {
    "IF-I-M": Case(MAIN | PICKLED_GUARDS, READ | PICKLED_GUARDS),
    "IF-I-XL": Case(
        MAIN | PLAIN_GUARDS | {"safety_checker": ["pytorch_model.fp16.bin"]},
        READ | PLAIN_GUARDS | {"safety_checker": ["pytorch_model.fp16.bin"]},
    ),
    "IF-II-M": Case(
        MAIN
        | {
            "text_encoder": [SHARDS, "pytorch_model.fp16-#-of-00002.bin", f"{T}.safetensors"],
            "safety_checker": both(T),
            "watermarker": [f"{U}.safetensors", f"{U}.bin"],
        },
        READ
        | {
            "text_encoder": [SHARDS],
            "safety_checker": [f"{T}.fp16.safetensors"],
            "watermarker": [f"{U}.safetensors"],
        },
        stage=2,
    ),
    "pickled": Case(
        layout := {
            "unet": [f"{U}.fp16.bin"],
            "text_encoder": ["pytorch_model.bin"],
            **PLAIN_GUARDS,
        },
        layout,
    ),
    "pickled shards": Case(
        layout := {
            "unet": [f"{U}-#-of-00002.bin"],
            "text_encoder": ["pytorch_model.fp16-#-of-00002.bin"],
            "safety_checker": ["pytorch_model-#-of-00002.bin"],
            "watermarker": [f"{U}.bin"],
        },
        layout,
    ),
    "old names": Case(
        layout := {
            "unet": [f"{U}-#-of-00002.fp16.safetensors"],
            "text_encoder": [f"{T}-#-of-00002.fp16.safetensors"],
            "safety_checker": [f"{T}-#-of-00002.fp16.safetensors"],
            "watermarker": [f"{U}.fp16.safetensors"],
        },
        layout,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def state_of(pipe: DiffusionPipeline, part: str) -> dict[str, Tensor]:
    return {name: value.float() for name, value in pipe.components[part].state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def expected(model: Path, part: str, read: Layout) -> dict[str, Tensor]:
    """The values that a component must have, from the cascade that was rewritten."""
    (file,) = (model / part).glob("*.safetensors")
    half = "fp16" in read[part][0]
    return {n: (t.half() if half else t).float() for n, t in load_file(file).items()}


def needed(model: Path, read: Layout) -> set[str]:
    """The files of a model that are downloaded: of networks the configuration and what is read."""
    files = {f"{part}/{name}" for part, names in read.items() for name in files_of(names)}
    places = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    return files | {place for place in places if not place.endswith((".safetensors", "README.md"))}


@every_case
@pytest.mark.parametrize("where", ["here", "hub"])
def test_a_published_layout_is_drawn_from_and_only_what_is_read_is_downloaded(
    guarded_cascade: RandomCascade,
    tmp_path: Path,
    hub: HubStandIn,
    capsys: pytest.CaptureFixture[str],
    case: Case,
    where: str,
) -> None:
    base, model = vars(guarded_cascade)[f"stage_{case.stage}"], tmp_path / "published"
    rewrite(base, model, case.layout)
    name = str(model)
    if where == "hub":
        name = f"owner/{tmp_path.name}"
        hub.publish(name, model)
    cascade = load_cascade(**{f"stage_{case.stage}": name}, variant="fp16", device="cpu")
    pipe = cascade.stages[case.stage]
    for part in ("unet", "safety_checker", "watermarker"):
        assert same(state_of(pipe, part), expected(base, part, case.read)), part
    text = state_of(cascade.text, "text_encoder")
    for key, value in expected(base, "text_encoder", case.read).items():
        assert torch.equal(text[key], value), key
    said = capsys.readouterr().err
    assert {p for p in case.read if f"{p} of {name}: no fp16 variant" in said} == case.told
    pickled = {(p, n) for p, names in case.read.items() for n in files_of(names) if ".bin" in n}
    assert said.count("is converted to") == len(pickled)
    if where == "hub":
        assert hub.downloaded(name) == needed(base, case.read)
    load_cascade(**{f"stage_{case.stage}": name}, variant="fp16", device="cpu")
    assert name not in capsys.readouterr().err  # told and converted once
    low_res = Image.new("RGB", (32, 32)) if case.stage == 2 else None
    pictures = cascade("a cat", seed=0, low_res=low_res, sampling=TWO)
    assert pictures[0].final.width == pipe.unet.config.sample_size


@every_case
def test_the_libraries_own_loaders_read_the_same(
    guarded_cascade: RandomCascade, tmp_path: Path, case: Case
) -> None:
    rewrite(vars(guarded_cascade)[f"stage_{case.stage}"], tmp_path / "published", case.layout)
    files = ModelFiles(str(tmp_path / "published"), None, "fp16")
    for part, kind in KINDS.items():
        name = case.read[part][0]
        if kind is T5EncoderModel and case is CASES["old names"]:
            continue  # which transformers has never written
        variant, safe = "fp16" if "fp16" in name else None, "safetensors" in name
        place = files.root / part
        theirs = kind.from_pretrained(place, variant=variant, use_safetensors=safe)
        with files.plain_folder([part]) as folder:
            ours = kind.from_pretrained(folder / part, use_safetensors=True)
        assert same(ours.state_dict(), theirs.state_dict()), part


def test_stage_3_falls_back_part_by_part(random_cascade: RandomCascade, tmp_path: Path) -> None:
    layout = {
        "vae": [f"{U}.fp16.bin"],
        "text_encoder": ["pytorch_model-#-of-00002.bin"],
        "unet": [f"{U}-#-of-00002.fp16.safetensors"],
    }
    rewrite(random_cascade.stage_3, tmp_path / "published", layout)
    pipe = Source(str(tmp_path / "published"), 3, None, "fp16").pipeline(torch.float32)
    for part in layout:
        assert same(expected(random_cascade.stage_3, part, layout), state_of(pipe, part)), part


@pytest.fixture(params=[name for name, case in CASES.items() if case.stage == 1])
def published(
    request: pytest.FixtureRequest, guarded_cascade: RandomCascade, tmp_path: Path, hub: HubStandIn
) -> tuple[str, Case]:
    """A model of Stage I on the hub, and its layout."""
    case, name = CASES[request.param], f"owner/{tmp_path.name}"
    rewrite(guarded_cascade.stage_1, tmp_path / "published", case.layout)
    hub.publish(name, tmp_path / "published")
    return name, case


def recipe_of(name: str, folder: Path, **sections: object) -> Recipe:
    tree = {
        "name": "published",
        "base": {"stage_1": name, "variant": "fp16"},
        "data": {"source": "datasets/octopus", "prompt": "a photo"},
        "stage_1": {"steps": 1},
        "cache_dir": str(folder / "captions"),
    }
    return Recipe.model_validate(tree | sections)


def test_training_starts_from_it(
    guarded_cascade: RandomCascade, published: tuple[str, Case], tmp_path: Path, hub: HubStandIn
) -> None:
    name, case = published
    recipe, base = recipe_of(name, tmp_path), guarded_cascade.stage_1
    embed_captions(["a cat"], CaptionCache.of(recipe, CPU))
    trained = trainee_of(recipe).unet.state_dict()
    unet = {key.replace(".base_layer.", "."): value for key, value in trained.items()}
    for key, value in expected(base, "unet", case.read).items():
        assert torch.equal(unet[key], value)
    files = {file for file in needed(base, case.read) if not file.startswith(GUARDS)}
    assert hub.downloaded(name) == files


def export_random_adapter(base: Path, folder: Path) -> None:
    spec, unet = AdapterSpec(rank=2), UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    attach(unet, spec)
    for tensor in adapter_state(unet).values():
        tensor.normal_(std=0.05)
    info = AdapterInfo(base_model=str(base), stage=1, spec=spec, step=1, recipe="", version="0")
    export_adapter(unet, folder, info)


def test_an_adapter_is_merged_into_it(
    guarded_cascade: RandomCascade, published: tuple[str, Case], tmp_path: Path, hub: HubStandIn
) -> None:
    name, case = published
    base = guarded_cascade.stage_1
    export_random_adapter(base, tmp_path / "adapter")
    options = ["--base", name, "--base-variant", "fp16", "--dtype", "fp32"]
    merge([str(tmp_path / "adapter"), *options, "--out", str(tmp_path / "merged")])
    assert hub.downloaded(name) == needed(base, case.read)
    loaded = load_cascade(name, variant="fp16", adapters=[tmp_path / "adapter"], device="cpu")
    schedule = "scheduler/scheduler_config.json"
    assert (tmp_path / "merged" / schedule).read_bytes() == (base / schedule).read_bytes()
    assert b'"lambda_min_clipped": -5.1' in (base / schedule).read_bytes()
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "merged", subfolder="unet")
    assert same(theirs.state_dict(), state_of(loaded.stages[1], "unet"))
    again = load_cascade(tmp_path / "merged", variant="fp16", device="cpu")
    for part in ("unet", "safety_checker", "watermarker"):
        assert same(state_of(again.stages[1], part), state_of(loaded.stages[1], part)), part


def planned(recipe: Recipe) -> dict[str, tuple[int, float]]:
    """The files and GiB of each row of a plan's downloads."""
    rows = [line.rsplit(maxsplit=2) for line in format_downloads(recipe).splitlines()[1:-1]]
    return {name: (int(files), float(gib)) for name, files, gib in rows}


@pytest.mark.parametrize("drawing", [True, False])
def test_a_plan_says_what_is_downloaded(
    published: tuple[str, Case],
    tmp_path: Path,
    hub: HubStandIn,
    monkeypatch: pytest.MonkeyPatch,
    drawing: bool,
) -> None:
    name, _ = published
    prompts = ["a cat"] if drawing else []
    recipe = recipe_of(name, tmp_path, validation={"prompts": prompts})
    plan(recipe, CPU)
    before = hub.downloaded(name)
    assert not [file for file in before if file.endswith((".safetensors", ".bin"))]
    monkeypatch.setattr("finetune.memory.report.GIB", 1)  # bytes
    foreseen = planned(recipe)
    assert hub.downloaded(name) == before
    embed_captions(["a cat"], CaptionCache.of(recipe, CPU))
    trainee_of(recipe)
    if drawing:
        load_cascade(name, variant="fp16", device="cpu", parts=Parts(text_encoder=False))
    sizes: dict[str, list[int]] = {}
    for place in hub.downloaded(name) - before:
        size = len(hub.repositories[name].files()[place])
        sizes.setdefault(f"stage_1, {place.partition('/')[0]}", []).append(size)
    assert foreseen == {part: (len(each), sum(each)) for part, each in sizes.items()}
    assert format_downloads(recipe) == ""


def test_a_plan_offline(
    guarded_cascade: RandomCascade,
    tmp_path: Path,
    hub: HubStandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"owner/{tmp_path.name}"
    hub.publish(name, guarded_cascade.stage_1)
    recipe = recipe_of(name, tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    main([str(tmp_path / "recipe.yaml")])
    online = capsys.readouterr().out
    assert re.search(r"^stage_1, unet +1 +\d", online, re.MULTILINE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main([str(tmp_path / "recipe.yaml")])
    assert capsys.readouterr().out == online  # the hub's listing is remembered
    older = tmp_path / "older"  # clients kept no listings
    ignore = shutil.ignore_patterns("trees")
    shutil.copytree(constants.HF_HUB_CACHE, older, symlinks=True, ignore=ignore)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(older))
    main([str(tmp_path / "recipe.yaml")])
    out = capsys.readouterr().out
    assert out.endswith(f"The downloads for {name} cannot be listed offline.\n")


def offline(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unreachable(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()
    close_session()  # its connections were kept alive
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between attempts


@pytest.mark.parametrize("cut_off", [offline, unreachable])
def test_what_is_in_the_cache_loads_without_the_hub_and_what_is_not_is_said(
    guarded_cascade: RandomCascade,
    tmp_path: Path,
    hub: HubStandIn,
    monkeypatch: pytest.MonkeyPatch,
    cut_off: Callable[[HubStandIn, pytest.MonkeyPatch], None],
) -> None:
    name = f"owner/{tmp_path.name}"
    rewrite(guarded_cascade.stage_1, tmp_path / "published", CASES["pickled"].layout)
    hub.publish(name, tmp_path / "published")
    before = Source(name, 1, None, "fp16").unet("fp32", CPU).state_dict()
    cut_off(hub, monkeypatch)
    assert same(Source(name, 1, None, "fp16").unet("fp32", CPU).state_dict(), before)
    with pytest.raises(UserError, match=f"The model '{name}' cannot be loaded") as caught:
        Source(name, 1, None, "fp16").text_encoder("fp32", CPU)
    assert "\n" not in str(caught.value)


def test_a_plan_of_folders_has_no_downloads(guarded_cascade: RandomCascade, tmp_path: Path) -> None:
    assert format_downloads(recipe_of(str(guarded_cascade.stage_1), tmp_path)) == ""


def test_the_index_of_a_model_does_not_lead_out_of_it(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    shutil.copytree(random_cascade.stage_1, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["../outside"] = ["diffusers", "UNet2DConditionModel"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    source = Source(str(tmp_path / "model"), 1)
    assert list(source.files.parts) == ["scheduler", "text_encoder", "tokenizer", "unet"]


class Runs:
    """What runs code once it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


SPOILT: dict[str, Callable[[Path, Path], object]] = {
    "cut off": lambda file, _: file.write_bytes(file.read_bytes()[:-200]),
    "empty": lambda file, _: file.write_bytes(b""),
    "malicious": lambda file, mark: torch.save({"weight": Runs(mark)}, file),
    "bare pickle": lambda file, mark: file.write_bytes(pickle.dumps({"weight": Runs(mark)})),
    "nested": lambda file, _: torch.save({"state_dict": {"weight": torch.ones(2)}}, file),
    "a list": lambda file, _: torch.save([torch.ones(2)], file),
    "sparse": lambda file, _: torch.save({"weight": torch.eye(2).to_sparse()}, file),
    "complex": lambda file, _: torch.save({"weight": torch.ones(2, dtype=torch.cfloat)}, file),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("part", ["watermarker", "unet"])
def test_a_pickle_of_anything_but_tensors_is_refused_in_one_sentence_and_never_run(
    guarded_cascade: RandomCascade,
    tmp_path: Path,
    part: str,
    spoil: Callable[[Path, Path], object],
) -> None:
    model, mark = tmp_path / "published", tmp_path / "ran"
    rewrite(guarded_cascade.stage_1, model, {part: [f"{U}.bin"]})
    spoil(model / part / f"{U}.bin", mark)
    sentence = f"{part}/{U}.bin of .* must be a file of PyTorch"
    with pytest.raises(UserError, match=sentence) as caught:
        load_cascade(model, device="cpu", parts=Parts(text_encoder=False))
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickled_file_is_converted_once_and_again_where_it_changes(
    tmp_path: Path, archive: bool
) -> None:
    path = tmp_path / "pytorch_model.bin"
    shared = torch.randn(3, 4, dtype=torch.float16)
    state = {
        "a": shared,
        "tied": shared,
        "turned": shared.T,
        "part": torch.arange(12)[2:4],
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 3, dtype=torch.bfloat16),
    }
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    converted = as_safetensors(path, "model")
    stored = load_file(converted)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], value) for key, value in state.items())
    assert all(stored[key].dtype == value.dtype for key, value in state.items())
    time = converted.stat().st_mtime_ns
    assert as_safetensors(path, "model") == converted
    assert converted.stat().st_mtime_ns == time
    torch.save({"a": shared + 1}, path)
    assert torch.equal(load_file(as_safetensors(path, "model"))["a"], shared + 1)
    assert {place.name for place in tmp_path.iterdir()} == {path.name, "cache"}


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3), "b": torch.ones(4)}, path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "numpy", full)
        with pytest.raises(UserError, match="cannot be written"):
            as_safetensors(path, "model")
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [".lock"]
    assert load_file(as_safetensors(path, "model")).keys() == {"a", "b"}


def test_a_unet_folder_of_its_own_falls_back(random_cascade: RandomCascade, tmp_path: Path) -> None:
    rewrite(random_cascade.stage_1, tmp_path / "model", {"unet": [f"{U}-#-of-00002.bin"]})
    stored = StoredUNet.find(str(tmp_path / "model" / "unet"), None, "fp16")
    (file,) = (random_cascade.stage_1 / "unet").glob("*.safetensors")
    assert all(torch.equal(stored.read(name), value) for name, value in load_file(file).items())
