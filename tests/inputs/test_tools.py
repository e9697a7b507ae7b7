"""The arguments of the commands that work on adapters: all are checked before the work begins."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.inputs import Refused, check_refused
from tests.builders.random_cascade import RandomCascade

SPECS = {
    "dog": AdapterSpec(rank=2),
    "cat": AdapterSpec(rank=4),
    "dora": AdapterSpec(kind="dora", rank=2),
    "loha": AdapterSpec(kind="loha", rank=2),
}


@pytest.fixture(scope="module")
def places(
    random_cascade: RandomCascade,
    guarded_cascade: RandomCascade,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Exported adapters and models by name, none of which a refused command may change."""
    root = tmp_path_factory.mktemp("places")
    base = random_cascade.stage_1
    found = {"1": base, "2": random_cascade.stage_2, "3": random_cascade.stage_3}
    found["other"] = guarded_cascade.stage_1
    for name, spec in SPECS.items():
        export(trained_unet(base, spec), root / name, base, 1, spec)
        found[name] = root / name
    spec = SPECS["dog"]
    export(trained_unet(found["2"], spec), root / "second", found["2"], 2, spec)
    found["second"] = root / "second"
    tensors = load_file(root / "dog" / "stage_1" / "pytorch_lora_weights.safetensors")
    save_file(tensors, root / "foreign.safetensors")
    save_file({k: t.new_ones(3, 7) for k, t in tensors.items() if "lora_A" in k}, root / "half")
    found["foreign"] = root / "foreign.safetensors"
    found["tuned"] = Path(shutil.copytree(base / "unet", root / "tuned"))
    weights = root / "tuned" / "diffusion_pytorch_model.safetensors"
    save_file({k: t * 2 for k, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    return found


def write_inputs(folder: Path) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "file").write_text("mine")
    (folder / "no_card").mkdir()


OUT = "--out new"
SCALE = ["--scale must be a number", "from -1000 to 1000"]

REFUSED: dict[str, tuple[str, Sequence[str]]] = {
    "merge at nan": (f"merge {{dog}} --scale nan {OUT}", [*SCALE, "(got nan)"]),
    "merge at infinity": (f"merge {{dog}} --scale inf {OUT}", [*SCALE, "(got inf)"]),
    "merge at 1e30": (f"merge {{dog}} --scale 1e30 {OUT}", [*SCALE, "(got 1e+30)"]),
    "merge at words": (f"merge {{dog}} --scale much {OUT}", ["argument --scale", "'much'"]),
    "merge at two scales": (
        f"merge {{dog}} --scale 1 --scale 2 {OUT}",
        ["each of the 1", "1.0, 2"],
    ),
    "merge into a full folder": ("merge {dog} --out full", ["full already exists", "new folder"]),
    "merge into a file": ("merge {dog} --out file", ["file already exists", "new folder"]),
    "merge below a file": ("merge {dog} --out file/new", ["cannot be written (Not a directory)"]),
    "merge where nothing can be": ("merge {dog} --out /proc/new", ["/proc/new cannot be written"]),
    "merge into a long name": (f"merge {{dog}} --out {'x' * 300}", ["File name too long"]),
    "merge at nobody's home": ("merge {dog} --out ~nobody_here/x", ["no user's home folder"]),
    "merge without --out": ("merge {dog}", ["required: --out", "--help"]),
    "merge in shards of nothing": (f"merge {{dog}} --max-shard-size 0GB {OUT}", ["such as 5GB"]),
    "merge in shards below nothing": (f"merge {{dog}} --max-shard-size=-5GB {OUT}", ["-5GB"]),
    "merge in endless shards": (f"merge {{dog}} --max-shard-size infGB {OUT}", ["got 'infGB'"]),
    "merge as a variant of dots": (
        f"merge {{dog}} --variant ../x {OUT}",
        ["--variant must be let"],
    ),
    "merge in an unknown precision": (f"merge {{dog}} --dtype fp99 {OUT}", ["argument --dtype"]),
    "merge Stage III": (
        f"merge {{dog}} --stage 3 {OUT}",
        ["argument --stage", "invalid choice: 3"],
    ),
    "merge a stage that it lacks": (
        f"merge {{dog}} --stage 2 {OUT}",
        ["adapter of Stage 1", "--st"],
    ),
    "merge into another base": (f"merge {{dog}} --base {{other}} {OUT}", ["trained on Stage 1 of"]),
    "merge into no base": (f"merge {{foreign}} {OUT}", ["do not say which base", "--base"]),
    "merge into what is no model": (
        f"merge {{dog}} --base file {OUT}",
        ["'file'", "model_index.json"],
    ),
    "merge nothing": (f"merge nowhere {OUT}", ["nowhere has no exported adapter"]),
    "merge a model": (f"merge {{1}} {OUT}", ["has no exported adapter"]),
    "resize to nothing": (f"resize {{dog}} --rank 0 {OUT}", ["--rank must be at least 1 (got 0)"]),
    "resize to no rank": (f"resize {{dog}} {OUT}", ["give --rank, --error or both"]),
    "resize to half": (f"resize {{dog}} --rank 0.5 {OUT}", ["argument --rank", "'0.5'"]),
    "resize with any error": (f"resize {{dog}} --error 1 {OUT}", ["less than 1 (got 1.0)"]),
    "resize with an error of nan": (f"resize {{dog}} --error nan {OUT}", ["(got nan)"]),
    "resize into a full folder": ("resize {dog} --rank 1 --out full", ["full already exists"]),
    "resize without a base": (f"resize {{dora}} --rank 1 {OUT}", ["kind dora", "--base"]),
    "resize on another base": (f"resize {{dora}} --rank 1 --base {{other}} {OUT}", ["trained on"]),
    "combine nothing": (f"combine {OUT}", ["required: FOLDER[=SCALE]"]),
    "combine at nan": (f"combine {{dog}}=nan {{cat}} {OUT}", ["scale of", "(got nan)"]),
    "combine at 1e30": (f"combine {{dog}}=1e30 {{cat}} {OUT}", ["from -1000 to 1000"]),
    "combine at nothing": (f"combine {{dog}}=0 {{cat}}=0 {OUT}", ["nothing to combine"]),
    "combine at words": (f"combine {{dog}}=much {OUT}", ["'much', which is not a scale"]),
    "combine two ranks": (f"combine {{dog}} {{cat}} {OUT}", ["all ranks must be equal", "2", "4"]),
    "combine without a density": (
        f"combine {{dog}} {{dog}} --method ties {OUT}",
        ["a density abov"],
    ),
    "combine at a density of nan": (
        f"combine {{dog}} {{dog}} --method ties --density nan {OUT}",
        ["density above 0 and up to 1 (got nan)"],
    ),
    "combine at a density for nothing": (
        f"combine {{dog}} {{dog}} --density 0.5 {OUT}",
        ["takes no density (got 0.5)", "leave it out"],
    ),
    "combine to a rank of a billion": (
        f"combine {{dog}} {{cat}} --method svd --rank 1000000000 {OUT}",
        ["a rank from 1 to 10000 (got 1000000000)"],
    ),
    "combine to a rank of nothing": (
        f"combine {{dog}} {{cat}} --method svd --rank 0 {OUT}",
        ["a rank from 1 to 10000 (got 0)"],
    ),
    "combine by an unknown method": (
        f"combine {{dog}} --method sum {OUT}",
        ["invalid choice: 'sum'"],
    ),
    "combine with a negative seed": (
        f"combine {{dog}} --seed=-1 {OUT}",
        ["A seed must be a whole"],
    ),
    "combine a DoRA": (f"combine {{dora}} {{dog}} {OUT}", ["(dora) cannot be combined", "set_ada"]),
    "combine of unknown stages": (
        f"combine {{foreign}} {OUT}",
        ["does not say which stage", "--st"],
    ),
    "combine into a file": ("combine {dog} --out file", ["file already exists"]),
    "combine on no device": (
        f"combine {{dog}} --device toaster {OUT}",
        ["'toaster' cannot be used"],
    ),
    "extract from itself": (f"extract {{1}} --base {{1}} --rank 1 {OUT}", ["does not differ"]),
    "extract to no rank": (f"extract {{tuned}} --base {{1}} {OUT}", ["give --rank, --error"]),
    "extract unknown modules": (
        f"extract {{tuned}} --base {{1}} --rank 1 {OUT} --targets to_qq",
        ["'to_qq' matches no Linear or Conv2d", "to_q"],
    ),
    "extract from another architecture": (
        f"extract {{2}} --base {{1}} --rank 1 {OUT}",
        ["different architectures"],
    ),
    "extract from nothing": (f"extract nowhere --base {{1}} --rank 1 {OUT}", ["'nowhere'"]),
    "extract with a prompt that nobody sees": (
        f"extract {{tuned}} --base {{1}} --rank 1 {OUT} --prompt \u200b",
        ["no visible character"],
    ),
    "extract into a full folder": ("extract {tuned} --base {1} --rank 1 --out full", ["full alr"]),
    "repair a LoHa": ("repair {loha}/stage_1 --out new.safetensors", ["kind loha", "resize"]),
    "repair into another format": (
        "repair {foreign} --out new.bin",
        ["end in .safetensors", "new"],
    ),
    "repair in place": ("repair {foreign} --out {foreign}", ["is the file to repair", "another"]),
    "repair nothing": ("repair nowhere", ["nowhere has no exported adapter"]),
    "inspect on no model": ("inspect {dog} --base nowhere", ["'nowhere'", "owner/name"]),
    "inspect two bases of a stage": ("inspect {dog} --base {1} --base {1}", ["Stage 1"]),
    "inspect Stage III": ("inspect {dog} --base {3}", ["StableDiffusionUpscalePipeline"]),
    "diff of two stages": ("diff {dog} {second}", ["different stages", "one stage"]),
    "diff of a model and an adapter": ("diff {1} {dog}", ["is a model, and the other is not"]),
    "diff of two architectures": ("diff {1} {2}", ["different architectures"]),
    "diff of one": ("diff {dog}", ["required: b"]),
    "diff without a base": ("diff {dora} {dog}", ["kind dora", "--base"]),
    "encode nothing": ("encode {1} --out new", ["required: --prompt"]),
    "encode what nobody sees": ("encode {1} --prompt \u200b --out new", ["no visible character"]),
    "encode 120,000 letters": (f"encode {{1}} --prompt {'x' * 120_000} --out new", ["shorten it"]),
    "encode what is emptied": ("encode {1} --prompt <sks> --out new", ["leaves no word", "<sks>"]),
    "encode with no text encoder": ("encode {tuned} --prompt a --out new", ["tuned"]),
    "encode with Stage III": ("encode {3} --prompt a --out new", ["StableDiffusionUpscale"]),
    "encode into a folder": (
        "encode {1} --prompt a --out full",
        ["must be a file, but is a folder"],
    ),
    "encode where nothing can be": (
        "encode {1} --prompt a --out /proc/x",
        ["/proc/x cannot be wr"],
    ),
    "encode on no device": (
        "encode {1} --prompt a --out new --device toaster",
        ["'toaster' cannot"],
    ),
    "a card for a single stage": (
        "card {dog}/stage_1",
        ["is a single adapter, not an exported fol"],
    ),
    "a card for nothing": ("card nowhere", ["nowhere has no exported adapter"]),
    "push nothing": ("push nowhere me/dog", ["nowhere has no exported adapter"]),
    "push a single stage": ("push {dog}/stage_1 me/dog", ["is a single adapter"]),
    "push without a card": (
        "push {dog} me/dog",
        ["README.md is not a model card", "adapters.card"],
    ),
    "push as two things": ("push {dog} me/dog --pr --revision a", ["not allowed with argument"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_the_work(
    name: str,
    places: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    line, says = REFUSED[name]
    command, *arguments = line.split(" ")

    def arrange(folder: Path) -> list[str]:
        monkeypatch.chdir(folder)
        write_inputs(folder)
        parts = arguments
        for place, path in places.items():
            parts = [part.replace(f"{{{place}}}", str(path)) for part in parts]
        return parts

    main = import_module(f"adapters.{command}").main
    before = sorted(places["dog"].parent.rglob("*"))
    check_refused(Refused(name, arrange, says), main, tmp_path, capsys)
    assert sorted(places["dog"].parent.rglob("*")) == before
    assert [str(warning.message) for warning in recwarn] == []


LATE: dict[str, tuple[str, str]] = {
    "merge": ("merge {dog} --out full", "adapters.files.stage_adapter.StageAdapter.load_all"),
    "resize": ("resize {dog} --rank 1 --out full", "adapters.merging.low_rank.adapter_path"),
    "extract": (
        "extract {tuned} --base {1} --rank 1 --out full",
        "adapters.merging.low_rank.match_targets",
    ),
    "combine": ("combine {dog} --out full", "adapters.files.stage_adapter.StageAdapter.load_all"),
}


@pytest.mark.parametrize("name", LATE)
def test_a_folder_is_checked_before_anything_is_read(
    name: str,
    places: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line, later = LATE[name]
    monkeypatch.setattr(later, lambda *_, **__: pytest.fail("something was read"))
    for place, path in places.items():
        line = line.replace(f"{{{place}}}", str(path))
    command, *arguments = line.split()
    monkeypatch.chdir(tmp_path)

    def arrange(folder: Path) -> list[str]:
        write_inputs(folder)
        return arguments

    main: Callable[[list[str]], None] = import_module(f"adapters.{command}").main
    check_refused(Refused(name, arrange, ["already exists"]), main, tmp_path, capsys)


def test_a_home_is_put_in_wherever_a_path_is_named(
    places: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(places["dog"], tmp_path / "dog")
    run = {name: import_module(f"adapters.{name}").main for name in ("resize", "combine", "repair")}
    run["resize"](["~/dog", "--rank", "1", "--out", "~/small"])
    run["combine"](["~/dog=0.5", "--out=~/half"])
    run["repair"](["~/dog/stage_1", "--out", "~/whole.safetensors"])
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"dog", "small", "half", "whole.safetensors"}
    assert torch.equal(
        *(
            load_file(tmp_path / name)["unet.mid_block.attentions.0.to_q.lora_A.weight"]
            for name in ("whole.safetensors", "dog/stage_1/pytorch_lora_weights.safetensors")
        )
    )
