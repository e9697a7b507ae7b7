"""A merged folder is a whole model that plain diffusers loads, and equals the merged cascade."""

import errno
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import IFPipeline, UNet2DConditionModel
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from torch import Tensor

from adapters import Parts, load_cascade
from adapters.files.export import AdapterInfo, export_adapter
from adapters.merge import main
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import (
    DIFFUSERS_SPECS,
    PEFT_SPECS,
    PIPELINES,
    base_of,
    export,
    trained_unet,
)
from tests.builders.adapters import name_of as spec_name
from tests.builders.commands import refusal
from tests.builders.hub_stand_in import hub_stand_in
from tests.builders.other_tools import ATTENTION, kohya
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet

SPEC = AdapterSpec(rank=4, alpha=6.0, targets="attention+conv")


def merge(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def merged_in_memory(
    cascade: RandomCascade, stage: int, *adapters: tuple[Path, float]
) -> dict[str, Tensor]:
    loaded = load_cascade(
        **{f"stage_{stage}": base_of(cascade, stage)}, parts=Parts(text_encoder=False)
    )
    for folder, scale in adapters:
        loaded.add_adapter(folder, scale)
    return loaded.stages[stage].unet.state_dict()


def plain(stage: int, folder: Path, **options: object) -> dict[str, Tensor]:
    """The UNet of a folder as the stage's diffusers pipeline loads it, without text encoder."""
    pipe = PIPELINES[stage].from_pretrained(folder, text_encoder=None, **options)
    return pipe.unet.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def exported(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of both stages, with a card."""
    folder = tmp_path_factory.mktemp("exported")
    for stage in (1, 2):
        base = base_of(random_cascade, stage)
        export(trained_unet(base, SPEC), folder, base, stage, SPEC)
    return folder


KINDS = [(1 + n % 2, spec) for n, spec in enumerate([*DIFFUSERS_SPECS, *PEFT_SPECS])]


@pytest.mark.parametrize(("stage", "spec"), KINDS, ids=spec_name)
def test_it_equals_the_cascade_bit_for_bit(
    random_cascade: RandomCascade, tmp_path: Path, stage: int, spec: AdapterSpec
) -> None:
    base = base_of(random_cascade, stage)
    folder = export(trained_unet(base, spec), tmp_path, base, stage, spec).folder
    merge(folder, "--base", base, "--scale", 0.75, "--out", tmp_path / "merged")
    expected = merged_in_memory(random_cascade, stage, (folder, 0.75))
    assert same(plain(stage, tmp_path / "merged"), expected)
    assert not same(plain(stage, base), expected)


def test_adapters_add_up_and_both_stages_are_merged_at_once(
    random_cascade: RandomCascade,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = AdapterSpec(kind="loha", rank=2, targets="all")
    base = random_cascade.stage_1
    second = export(trained_unet(base, spec, seed=1), tmp_path / "second", base, 1, spec).folder
    merge(exported, second.parent, "--scale", 0.5, "--scale", -2, "--out", tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"stage_1", "stage_2"}
    expected = {
        1: merged_in_memory(random_cascade, 1, (exported, 0.5), (second, -2)),
        2: merged_in_memory(random_cascade, 2, (exported, 0.5)),
    }
    for stage, weights in expected.items():
        assert same(plain(stage, tmp_path / "merged" / f"stage_{stage}"), weights)
    merge(exported, "--stage", 2, "--scale", 0.5, "--out", tmp_path / "one")
    assert same(plain(2, tmp_path / "one"), expected[2])
    assert "left out" not in capsys.readouterr().err
    merge(exported, "--base", base, "--scale", 0.5, "--out", tmp_path / "other")
    assert "is of Stage 2 and was left out; to merge it, name its base" in capsys.readouterr().err


def test_another_tools_adapter_finds_its_stage(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    file = kohya(trained_unet(random_cascade.stage_1, ATTENTION), tmp_path)
    merge(file, "--base", random_cascade.stage_1.parent, "--out", tmp_path / "merged")
    expected = merged_in_memory(random_cascade, 1, (file, 1.0))
    assert same(plain(1, tmp_path / "merged"), expected)


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_shards_and_their_index_are_those_that_diffusers_writes(
    random_cascade: RandomCascade,
    exported: Path,
    tmp_path: Path,
    variant: str,
    dtype: torch.dtype,
) -> None:
    size, ours = "100KB", tmp_path / "merged"
    merge(exported, "--stage", 1, "--variant", variant, "--max-shard-size", size, "--out", ours)
    weights = merged_in_memory(random_cascade, 1, (exported, 1.0))
    unet = UNet2DConditionModel.from_pretrained(random_cascade.stage_1, subfolder="unet")
    unet.load_state_dict(weights)
    unet.to(dtype).save_pretrained(tmp_path / "plain", variant=variant, max_shard_size=size)
    listed = [
        sorted(path.name for path in f.iterdir()) for f in (ours / "unet", tmp_path / "plain")
    ]
    assert listed[0] == listed[1]
    assert len(listed[0]) > 5
    index = f"diffusion_pytorch_model.safetensors.index.{variant}.json"
    texts = [json.loads((f / index).read_text()) for f in (ours / "unet", tmp_path / "plain")]
    assert texts[0] == texts[1]
    # as threestudio loads its guidance
    guidance = IFPipeline.from_pretrained(
        ours,
        text_encoder=None,
        safety_checker=None,
        watermarker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        variant=variant,
        dtype=dtype,
    )
    rounded = {name: weight.to(dtype) for name, weight in weights.items()}
    assert same(guidance.unet.state_dict(), rounded)


def test_the_precision_is_the_bases_unless_it_is_named(
    random_cascade: RandomCascade, exported: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_cascade.stage_1, base)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.half().save_pretrained(base / "unet", variant="fp16")
    arguments = [exported / "stage_1", "--base", base, "--base-variant", "fp16"]
    merge(*arguments, "--out", tmp_path / "same")
    merge(*arguments, "--dtype", "fp32", "--out", tmp_path / "fp32")
    cascade = load_cascade(
        base, variant="fp16", adapters=[exported], parts=Parts(text_encoder=False)
    )
    expected = cascade.stages[1].unet.state_dict()
    assert same(plain(1, tmp_path / "fp32"), expected)
    rounded = {name: weight.half() for name, weight in expected.items()}
    assert same(plain(1, tmp_path / "same", dtype=torch.float16), rounded)
    assert [path.name for path in sorted((tmp_path / "same" / "unet").iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the UNet's weights and the card, by their place in a model's folder."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if name != "README.md" and not name.startswith("unet/diffusion_pytorch_model")
    }


@pytest.mark.parametrize("link", [False, True])
def test_everything_but_the_unet_is_carried_over_whole(
    guarded_cascade: RandomCascade, tmp_path: Path, link: bool
) -> None:
    base = tmp_path / "bases" / "stage_1"
    shutil.copytree(guarded_cascade.stage_1, base)
    (base / "LICENSE.md").write_text("DeepFloyd IF LICENSE AGREEMENT")
    folder = export(trained_unet(base, SPEC), tmp_path, base, 1, SPEC).folder
    expected = contents(base)
    (base / "README.md").write_text("the base's")
    (base / ".cache").mkdir()
    (base / ".cache" / "lock").touch()
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the base's own weights, pickled")
    merge(folder, "--out", tmp_path / "merged", *["--link"] * link)
    assert contents(tmp_path / "merged") == expected
    assert not list((tmp_path / "merged").rglob("*.bin"))
    for part in ("text_encoder", "safety_checker", "watermarker", "tokenizer", "scheduler"):
        names = [path.name for path in (tmp_path / "merged" / part).iterdir()]
        assert names
        linked = [(base / part / n).samefile(tmp_path / "merged" / part / n) for n in names]
        assert set(linked) == {link}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Copyright (c) Stability AI Ltd. All Rights Reserved." in card
    assert "[LICENSE.md](LICENSE.md)" in card
    assert "| lora | 4 | 6 | 1 | 7 |" in card
    assert 'IFPipeline.from_pretrained(".")' in card


def test_a_licence_beside_the_stages_comes_along(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    base = tmp_path / "bases" / "stage_1"
    shutil.copytree(random_cascade.stage_1, base)
    (base.parent / "LICENSE").write_text("ours")
    merge(export(trained_unet(base, SPEC), tmp_path, base, 1, SPEC).folder, "--out", tmp_path / "m")
    assert (tmp_path / "m" / "LICENSE").read_text() == "ours"


def test_a_base_on_the_hub_is_taken_at_the_adapters_revision(
    random_cascade: RandomCascade,
    guarded_cascade: RandomCascade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(random_cascade.stage_1, tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("of the hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    unet, info = trained_unet(random_cascade.stage_1, SPEC), {"base_revision": "v2", "spec": SPEC}
    info |= {"base_model": "owner/base", "stage": 1, "step": 7, "recipe": "", "version": "1"}
    with hub_stand_in() as hub:
        hub.publish("owner/base", guarded_cascade.stage_1)
        commit = hub.publish("owner/base", tmp_path / "base", "v2")
        export_adapter(unet, tmp_path / "adapter", AdapterInfo(**info))
        merge(tmp_path / "adapter", "--out", tmp_path / "merged")
        assert {path.split("/")[4] for path in hub.asked if "/resolve/" in path} == {commit}
    expected = merged_in_memory(random_cascade, 1, (tmp_path / "adapter", 1.0))
    assert same(plain(1, tmp_path / "merged"), expected)
    assert (tmp_path / "merged" / "LICENSE").read_text() == "of the hub"
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))
    assert "base_model:\n- owner/base" in (tmp_path / "merged" / "README.md").read_text()


def snapshot_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--scale nan", "--scale must be a number for all adapters, or one for each of the 1"),
        ("--scale 1 --scale 2", "--scale must be a number for all adapters"),
        ("--scale 1e30 --variant fp16", "from -1000 to 1000"),
        ("--max-shard-size 5", "--max-shard-size must be a size with its unit, such as 5GB"),
        ("--variant ../fp16", "--variant must be letters"),
        ("--base {stage_3}", "but .* is a StableDiffusionUpscalePipeline; name Stage I or II"),
        ("--base {stage_2} --base {stage_2}", "are both of Stage 2"),
        ("--base nowhere", "'nowhere' is neither a folder that exists nor a hub name"),
        ("--base {other}", "was trained on Stage 1 of .*, not of .*sample_size is 32, not 16"),
        ("--base {stage_2} --stage 1", "is an adapter of Stage 1, but no base of that"),
        ("--out {out}/taken", "taken already exists; name a new folder"),
        ("--out {out}/taken/file/x", "cannot be written .*Not a directory"),
        ("{foreign}", "fits no UNet here"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    random_cascade: RandomCascade,
    guarded_cascade: RandomCascade,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    sentence: str,
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    spec = AdapterSpec(targets="all")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    kohya(trained_unet(random_cascade.stage_2, spec), foreign)
    places = {**vars(random_cascade), "other": guarded_cascade.stage_1}
    filled = arguments.format(**places, out=tmp_path, foreign=foreign)
    before = snapshot_of(tmp_path)
    error = refusal(capsys, main, "--out", tmp_path / "new", exported / "stage_1", *filled.split())
    assert re.search(sentence, error), error
    assert snapshot_of(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_adapters_of_another_tool_need_a_base(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = kohya(trained_unet(random_cascade.stage_1, ATTENTION), tmp_path)
    with pytest.raises(SystemExit):
        merge(file, "--out", tmp_path / "new")
    assert "do not say which base they were trained on; give --base" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("adapters.base.tensor_files.safetensors_header", full)
        with pytest.raises(SystemExit):
            merge(exported, "--out", tmp_path / "new")
    assert "new cannot be written (No space left" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit):
        merge(exported, "--out", tmp_path / "new")
    assert "of disk space, but only 1.00kB is free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes its own biases for damage
def test_a_peft_adapter_with_biases_is_refused(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = load_unet(random_cascade.stage_1)
    config = LoraConfig(target_modules=["to_q"], lora_bias=True)
    get_peft_model(unet, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit):
        merge(tmp_path / "adapter", "--base", random_cascade.stage_1, "--out", tmp_path / "new")
    assert "changes biases too" in capsys.readouterr().err
