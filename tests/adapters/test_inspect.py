"""What inspect tells is what diffusers and PEFT do with the adapter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from adapters.files.export import as_lora
from adapters.files.stage_adapter import StageAdapter
from adapters.inspect import main
from adapters.resize import main as resize
from adapters.weights.kinds import KINDS, AdapterSpec
from tests.builders.adapters import base_of, block, export, trained_unet, updates
from tests.builders.adapters import name_of as spec_name
from tests.builders.commands import refusal
from tests.builders.other_tools import ATTENTION, WRITERS, diffusers_script, kohya, name_of
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


SPECS = [
    (1 + number % 2, AdapterSpec(kind=kind, rank=4, alpha=6.0, targets=targets))
    for number, kind in enumerate(KINDS)
    for targets in ["attention" if kind == "oft" else "attention+conv"]
]


@pytest.mark.parametrize(("stage", "spec"), SPECS, ids=spec_name)
def test_the_norms_are_those_of_what_peft_merges(
    random_cascade: RandomCascade,
    tmp_path: Path,
    inspect: Callable[..., str],
    stage: int,
    spec: AdapterSpec,
) -> None:
    base = base_of(random_cascade, stage)
    unet = trained_unet(base, spec)
    folder = export(unet, tmp_path, base, stage, spec).folder
    (found,) = json.loads(inspect(folder, "--base", base, "--json"))
    weights = load_unet(base).state_dict()
    squares: dict[str, list[float]] = {}
    for name, update in updates(unet).items():
        for group in (block(name), "all"):
            sums = squares.setdefault(group, [0.0, 0.0, 0])
            sums[0] += float(update.double().square().sum())
            sums[1] += float(weights[f"{name}.weight"].double().square().sum())
            sums[2] += 1
    assert found["norm_of"] == "update"
    rows = {row.pop("block"): row for row in found["blocks"]}
    assert rows.keys() == squares.keys()
    order = ["down_blocks", "mid_block", "up_blocks", "all"]
    assert [order.index(name.partition(".")[0]) for name in rows] == sorted(
        order.index(name.partition(".")[0]) for name in rows
    )
    for name, (update, whole, count) in squares.items():
        assert rows[name]["modules"] == count
        assert rows[name]["norm"] == pytest.approx(update**0.5, rel=1e-4)
        assert rows[name]["relative"] == pytest.approx((update / whole) ** 0.5, rel=1e-4)
    (alone,) = json.loads(inspect(folder, "--json"))
    assert alone["base"] is None
    if spec.kind in ("lora", "rslora"):
        norms = [row["norm"] for row in found["blocks"]]
        assert [row["norm"] for row in alone["blocks"]] == norms
    else:
        assert alone["norm_of"] == "parameters"
        tensors = StageAdapter.load(folder).state.values()
        own = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
        assert alone["blocks"][-1]["norm"] == pytest.approx(own)
        assert "Its updates depend on its base" in inspect(folder)


def test_it_tells_all_that_an_exported_folder_says_of_itself(
    random_cascade: RandomCascade, tmp_path: Path, inspect: Callable[..., str]
) -> None:
    spec = AdapterSpec(kind="rslora", rank=3, alpha=6.0, targets=("to_q", "conv1"))
    for stage in (1, 2):
        base = base_of(random_cascade, stage)
        export(trained_unet(base, spec), tmp_path / "adapters", base, stage, spec)
    told = inspect(tmp_path / "adapters")
    for stage in (1, 2):
        assert f"stage_{stage}/adapter_model.safetensors" in told
        assert f"base          {base_of(random_cascade, stage)}\n" in told
        assert f"stage         {stage}\n" in told
    for line in (
        *("kind          rslora", "rank          3", "alpha         6", "prompts       a sks cat"),
        "targets       to_q, conv1 (",
        "trained       7 steps; exported by version",
        "diffusers     loads all of pytorch_lora_weights.safetensors",
        "recipe: 1 lines; --recipe prints them",
    ):
        assert told.count(line) == 2
    assert inspect(tmp_path / "adapters", "--recipe").count("recipe\nname: test") == 2
    found = json.loads(inspect(tmp_path / "adapters", "--json"))
    files = {path.name: path.stat().st_size for path in (tmp_path / "adapters/stage_1").iterdir()}
    assert found[0]["bytes"] == files
    assert found[0]["info"]["spec"]["targets"] == ["to_q", "conv1"]


@pytest.mark.parametrize(("write", "spec"), WRITERS, ids=name_of)
def test_adapters_of_other_tools(
    random_cascade: RandomCascade,
    tmp_path: Path,
    inspect: Callable[..., str],
    write: Callable[[UNet2DConditionModel, Path], Path],
    spec: AdapterSpec,
) -> None:
    path = write(trained_unet(random_cascade.stage_1, spec), tmp_path)
    (found,) = json.loads(inspect(path, "--base", random_cascade.stage_1, "--json"))
    assert found["info"] is None
    assert found["kind"] == "lora"
    assert set(found["ranks"].values()) == {4}
    assert set(found["alphas"].values()) == {spec.alpha or 4}
    assert found["base"]["matches"]
    told = inspect(path)
    assert "unknown: written by another tool" in told
    lost = found["tensors"] - found["for_diffusers"]["arriving"]
    assert ("adapters.repair writes a file" in told) == (lost > 0)
    assert lost == {"diffusers_script": 32, "simpletuner": 0}.get(write.__name__, lost)


def test_whether_it_matches_a_base(
    random_cascade: RandomCascade,
    guarded_cascade: RandomCascade,
    tmp_path: Path,
    inspect: Callable[..., str],
) -> None:
    spec = AdapterSpec(kind="dora")
    base, both = random_cascade.stage_1, random_cascade.stage_1.parent
    folder = export(trained_unet(base, spec), tmp_path, base, 1, spec).folder
    assert f"matches       {base}: yes" in inspect(folder, "--base", both)
    other = guarded_cascade.stage_1
    told = inspect(folder, "--base", other)
    assert f"matches       {other}: NO, sample_size is 32, not 16" in told
    assert "norm of parameters" in told  # another base does not tell the update
    assert "matches       not compared" in inspect(folder, "--base", random_cascade.stage_2)
    file = diffusers_script(trained_unet(base, ATTENTION), tmp_path)
    assert f"{base}: yes" in inspect(file, "--base", both)
    assert "stage_2: NO, unknown, missing or of" in inspect(file, "--base", both / "stage_2")


def test_what_an_approximation_loses_is_told(
    random_cascade: RandomCascade, tmp_path: Path, inspect: Callable[..., str]
) -> None:
    base, spec = random_cascade.stage_1, AdapterSpec(kind="lokr", rank=2)
    unet = trained_unet(base, spec)
    exported = export(unet, tmp_path / "lokr", base, 1, spec)
    assert exported.approximation is not None
    error = f"relative Frobenius error {exported.approximation.error:.2g}"
    told = inspect(exported.folder)
    assert f"a LoRA that approximates it, {error}" in told
    stand_in = inspect(exported.folder / "pytorch_lora_weights.safetensors")
    assert f"approximates  an adapter or a model, {error}" in stand_in
    small = tmp_path / "small"
    resize([str(exported.folder), "--rank", "1", "--base", str(base), "--out", str(small)])
    error = f"{as_lora(StageAdapter.load(exported.folder), unet, 1).error:.2g}"
    assert f"an adapter or a model, relative Frobenius error {error}" in inspect(small)


def test_ranks_of_their_own_are_summed_up(
    random_cascade: RandomCascade, tmp_path: Path, inspect: Callable[..., str]
) -> None:
    file = kohya(trained_unet(random_cascade.stage_1, AdapterSpec(rank=2)), tmp_path)
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("lora_down.weight"))
    up = key.replace("lora_down", "lora_up")
    tensors[key], tensors[up] = (
        torch.ones(5, tensors[key].shape[1]),
        torch.ones(len(tensors[up]), 5),
    )
    save_file(tensors, file)
    assert "rank          2 to 5\n" in inspect(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("nowhere", "nowhere has no exported adapter"),
        ("{stage_1}", "has no exported adapter"),
        ("{adapter} --base nowhere", "'nowhere' is neither a folder that exists nor a hub name"),
    ],
)
def test_mistakes_are_one_sentence(
    random_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    sentence: str,
) -> None:
    adapter = kohya(trained_unet(random_cascade.stage_1, ATTENTION), tmp_path)
    assert sentence in refusal(
        capsys, main, *arguments.format(**vars(random_cascade), adapter=adapter).split()
    )
