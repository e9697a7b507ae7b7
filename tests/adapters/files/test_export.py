"""An exported adapter loads whole and exactly, in diffusers and in PEFT, and describes itself."""

import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from adapters import atomic
from adapters.errors import UserError
from adapters.files.info import NOTICE, AdapterInfo, read_info
from adapters.files.licence import licence_files
from adapters.files.model_card import write_card
from adapters.files.stage_adapter import StageAdapter
from adapters.resize import main as resize
from adapters.weights.kinds import AdapterSpec, adapter_parameters
from tests.builders.adapters import (
    DIFFUSERS_SPECS,
    PEFT_SPECS,
    PIPELINES,
    base_of,
    export,
    name_of,
    trained_unet,
    updates,
)
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet, output, unet_inputs


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("spec", DIFFUSERS_SPECS, ids=name_of)
def test_diffusers_loads_every_tensor_exactly(
    random_cascade: RandomCascade, tmp_path: Path, stage: int, spec: AdapterSpec
) -> None:
    base = base_of(random_cascade, stage)
    unet = trained_unet(base, spec)
    exported = export(unet, tmp_path, base, stage, spec)
    pipe = PIPELINES[stage].from_pretrained(base, text_encoder=None)
    inputs = unet_inputs(unet)
    untouched = output(pipe.unet, inputs)
    pipe.load_lora_weights(exported.folder)
    pipe.unet.eval()
    loaded = sum("lora_" in name for name, _ in pipe.unet.named_parameters())
    written = load_file(exported.folder / "pytorch_lora_weights.safetensors")
    assert loaded == len(written) == exported.tensors == len(adapter_parameters(unet))
    assert exported.approximation is None
    # PyTorch's choice of kernel depends on requires_grad
    expected = output(unet.requires_grad_(False), inputs)
    assert torch.equal(output(pipe.unet.requires_grad_(False), inputs), expected)
    assert not torch.allclose(untouched, expected, atol=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("spec", [*DIFFUSERS_SPECS, *PEFT_SPECS], ids=name_of)
def test_peft_loads_exactly(
    random_cascade: RandomCascade, tmp_path: Path, stage: int, spec: AdapterSpec
) -> None:
    base = base_of(random_cascade, stage)
    unet = trained_unet(base, spec)
    exported = export(unet, tmp_path, base, stage, spec)
    inputs = unet_inputs(unet)
    peft_model = PeftModel.from_pretrained(load_unet(base), str(exported.folder)).eval()
    expected = output(unet.requires_grad_(False), inputs)
    assert torch.equal(output(peft_model, inputs), expected)
    assert not torch.allclose(output(load_unet(base), inputs), expected, atol=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("spec", PEFT_SPECS, ids=name_of)
def test_kinds_that_diffusers_lacks_reach_it_as_a_lora(
    random_cascade: RandomCascade, tmp_path: Path, stage: int, spec: AdapterSpec
) -> None:
    base = base_of(random_cascade, stage)
    unet = trained_unet(base, spec)
    exported = export(unet, tmp_path, base, stage, spec)
    assert exported.approximation is not None
    expected = updates(unet)
    values = {name: torch.linalg.svdvals(update) for name, update in expected.items()}
    lost = sum(float(v[spec.rank :].square().sum()) for v in values.values())
    error = (lost / sum(float(v.square().sum()) for v in values.values())) ** 0.5
    assert 0.01 < error < 1
    assert exported.approximation.error == pytest.approx(error, rel=1e-3)
    assert f"rank {spec.rank}, relative Frobenius error {error:.2g}" in exported.message
    pipe = PIPELINES[stage].from_pretrained(base, text_encoder=None)
    pipe.load_lora_weights(exported.folder)
    loaded = updates(pipe.unet)
    assert loaded.keys() == expected.keys()
    off = sum(float((loaded[name] - expected[name]).square().sum()) for name in loaded)
    assert (off / sum(float(u.square().sum()) for u in expected.values())) ** 0.5 == pytest.approx(
        error, rel=1e-3
    )
    info = StageAdapter.load(exported.folder / "pytorch_lora_weights.safetensors").info
    assert info.approximation_error == exported.approximation.error
    assert (info.spec.kind, info.spec.rank) == ("lora", spec.rank)


def test_the_message_says_how_to_make_a_lora_of_another_rank(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, spec = base_of(random_cascade, 1), AdapterSpec(kind="loha", rank=2)
    message = export(trained_unet(base, spec), tmp_path, base, 1, spec).message
    found = re.search(r"`python -m adapters\.resize (.*)`", message)
    assert found is not None
    given = {"BASE": str(base), "N": "3", "NEW": str(tmp_path / "new")}
    resize([given.get(word, word) for word in found[1].split()])
    assert "loha" in capsys.readouterr().out
    small = StageAdapter.load_all(tmp_path / "new")[0]
    assert (small.info.spec.kind, small.info.spec.rank) == ("lora", 3)
    pipe = PIPELINES[1].from_pretrained(base, text_encoder=None)
    pipe.load_lora_weights(small.folder)
    assert updates(pipe.unet).keys() == set(small.modules)


@pytest.mark.parametrize("spec", PEFT_SPECS, ids=name_of)
def test_as_a_lora_of_full_rank_nothing_is_lost(
    random_cascade: RandomCascade, tmp_path: Path, spec: AdapterSpec
) -> None:
    base = random_cascade.stage_1
    unet = trained_unet(base, spec)
    exported = export(unet, tmp_path, base, 1, spec, as_lora_rank=10_000)
    assert exported.approximation is not None
    assert exported.approximation.error < 1e-6
    pipe = PIPELINES[1].from_pretrained(base, text_encoder=None)
    pipe.load_lora_weights(exported.folder)
    inputs = unet_inputs(unet)
    torch.testing.assert_close(output(pipe.unet, inputs), output(unet, inputs), rtol=0, atol=1e-4)


def test_the_target_names_are_whole(random_cascade: RandomCascade, tmp_path: Path) -> None:
    spec = AdapterSpec(targets="all")
    unet = load_unet(random_cascade.stage_1)
    linear_and_conv = (torch.nn.Linear, torch.nn.Conv2d)
    expected = {n for n, module in unet.named_modules() if isinstance(module, linear_and_conv)}
    unet = trained_unet(random_cascade.stage_1, spec)
    exported = export(unet, tmp_path, random_cascade.stage_1, 1, spec)
    config = json.loads((exported.folder / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == expected


def test_an_adapter_describes_itself(random_cascade: RandomCascade, tmp_path: Path) -> None:
    spec = AdapterSpec(kind="dora", rank=3, alpha=6.0, dropout=0.1, targets=("to_q", "conv1"))
    unet = trained_unet(random_cascade.stage_1, spec)
    exported = export(unet, tmp_path, random_cascade.stage_1, 1, spec)
    info = read_info(exported.folder)
    assert info.spec == spec
    assert (info.stage, info.step, info.recipe, info.version) == (1, 7, "name: test\n", "1.2.3")
    assert info.base_model == str(random_cascade.stage_1)
    assert info.prompts == ("a sks cat",)
    assert info.created is None  # or no two exports would be the same
    with safe_open(exported.folder / "pytorch_lora_weights.safetensors", "pt") as file:
        assert AdapterInfo.model_validate_json(file.metadata()["if_adapter"], strict=False) == info


def test_exporting_again_replaces_the_stage_whole(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    base = random_cascade.stage_1
    for kind in ("lora", "loha"):
        spec = AdapterSpec(kind=kind)
        exported = export(trained_unet(base, spec), tmp_path, base, 1, spec)
    assert [path.name for path in tmp_path.iterdir()] == ["stage_1"]
    assert read_info(exported.folder).spec.kind == "loha"
    approximation = StageAdapter.load(exported.folder / "pytorch_lora_weights.safetensors").info
    assert approximation.approximation_error > 0


def no_header(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")


def truncated(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\0\1\2")


def missing(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("damage", [no_header, truncated, missing])
def test_reading_a_foreign_or_damaged_folder(
    random_cascade: RandomCascade, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    spec = AdapterSpec()
    unet = trained_unet(random_cascade.stage_1, spec)
    exported = export(unet, tmp_path, random_cascade.stage_1, 1, spec)
    damage(exported.folder)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        read_info(exported.folder)


def hub(
    monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]
) -> Callable[[int], AdapterInfo]:
    """A hub that is ``download``, and what adapters of its bases say of themselves."""
    monkeypatch.setattr("adapters.files.licence.snapshot_download", download)
    return lambda stage: AdapterInfo(
        base_model=f"DeepFloyd/IF-{stage}",
        base_revision="v2",
        stage=stage,
        spec=AdapterSpec(),
        step=7,
        recipe="name: test\n",
        version="1.2.3",
        licence_notice=NOTICE,
    )


def test_a_hub_base_hands_its_licence_on_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        snapshot = tmp_path / "hub" / name / revision
        snapshot.mkdir(parents=True)
        for file in ("LICENSE.md", "license.txt", "model_index.json"):
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (snapshot / file).write_text(f"{file} of {name} at {revision}")
        return str(snapshot)

    info = hub(monkeypatch, download)
    folder = tmp_path / "adapters"
    folder.mkdir()
    card = write_card(folder, [info(1), info(2)]).read_text()
    written = {path.name: path.read_text() for path in folder.iterdir() if path.name != "README.md"}
    assert written == {
        f"stage_{stage}-{file}": f"{file} of DeepFloyd/IF-{stage} at v2"
        for stage in (1, 2)
        for file in ("LICENSE.md", "license.txt")
    }
    assert all(f"({name})" in card for name in written)


def test_without_a_connection_the_card_links_to_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    card = write_card(tmp_path, [hub(monkeypatch, download)(1)]).read_text()
    assert NOTICE in card
    assert "[DeepFloyd/IF-1](https://huggingface.co/DeepFloyd/IF-1)" in card
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_licence_of_a_project_is_not_that_of_a_base_in_it(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("MIT")
    for name in ("my_base", "stage_1"):
        (tmp_path / name).mkdir()
    assert licence_files(str(tmp_path / "my_base")) == ()
    assert licence_files(str(tmp_path / "stage_1")) == (tmp_path / "LICENSE",)


def test_a_card_shows_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "adapters.files.licence.snapshot_download", lambda *_, **__: str(tmp_path / "no")
    )
    info = AdapterInfo(
        base_model="DeepFloyd/IF-I-XL-v1.0",
        stage=1,
        licence_notice=NOTICE,
        spec=AdapterSpec(kind="rslora", rank=8),
        prompts=("a sks cat",),
        step=7,
        recipe="name: test\n",
        version="1.2.3",
    )
    picture = Image.new("RGB", (8, 8), "red")
    card = write_card(tmp_path, [info], {"a sks cat on blue": picture}).read_text()
    assert "deepfloyd-if-license" in card
    assert "Copyright (c) Stability AI Ltd. All Rights Reserved." in card
    assert 'load_lora_weights("stage_1")' in card
    assert "| 1 | `DeepFloyd/IF-I-XL-v1.0` | rslora | 8 | 8 |" in card
    assert Image.open(tmp_path / "samples" / "00.png").getpixel((0, 0)) == (255, 0, 0)


def test_a_local_base_hands_its_licence_on(random_cascade: RandomCascade, tmp_path: Path) -> None:
    base = tmp_path / "bases" / "stage_1"
    load_unet(random_cascade.stage_1).save_pretrained(base / "unet")
    (base / "LICENSE").write_text("DeepFloyd IF LICENSE AGREEMENT")
    spec = AdapterSpec()
    folder = tmp_path / "adapters"
    info = read_info(export(trained_unet(base, spec), folder, base, 1, spec).folder)
    assert info.licence_notice is not None
    assert info.licence_notice.startswith("DeepFloyd is licensed under the DeepFloyd License")
    card = write_card(folder, [info]).read_text()
    assert info.licence_notice in card
    assert (folder / "stage_1-LICENSE").read_text() == "DeepFloyd IF LICENSE AGREEMENT"


@pytest.mark.parametrize("at_once", [True, False])
def test_an_export_that_is_cut_off_leaves_one_that_loads(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    base, spec = random_cascade.stage_1, DIFFUSERS_SPECS[0]
    unet = trained_unet(base, spec)
    folder = export(unet, tmp_path, base, 1, spec).folder
    if not at_once:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    replace, moved = os.replace, []

    def cut_off(source: Path, target: Path) -> None:
        if folder in (Path(source), Path(target)):  # and not the files in it
            moved.append(target)
            if len(moved) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with nullcontext() if at_once else pytest.raises(KeyboardInterrupt):
        export(unet, tmp_path, base, 1, spec)
    assert len(moved) == (0 if at_once else 3)
    assert StageAdapter.load(folder).info is not None
    assert [path.name for path in tmp_path.iterdir()] == ["stage_1"]
