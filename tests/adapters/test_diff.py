"""Distances and cosines of two adapters, or two UNets, are those of the whole matrices."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.diff import main
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import base_of, block, export, trained_unet, updates
from tests.builders.commands import refusal
from tests.builders.other_tools import ATTENTION, kohya
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet

COLUMNS = ("norm_a", "norm_b", "distance", "cosine")
CONV = AdapterSpec(rank=4, alpha=6.0, targets="attention+conv")


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def expected_rows(
    a: dict[str, Tensor], b: dict[str, Tensor], group: Callable[[str], str]
) -> dict[str, list[float | None]]:
    """Norm of A, of B, relative distance and cosine by group, from whole matrices."""
    rows = {}
    names = [*a, *(name for name in b if name not in a)]
    for key in dict.fromkeys([*map(group, names), "all"]):
        inside = [name for name in names if key in ("all", group(name))]
        flat = [
            torch.cat([x.get(n, torch.zeros_like(y.get(n, x.get(n)))).flatten() for n in inside])
            for x, y in ((a, b), (b, a))
        ]
        one, two = (tensor.double() for tensor in flat)
        na, nb = float(one.norm()), float(two.norm())
        distance = float((one - two).norm()) / na if na else None
        rows[key] = [na, nb, distance, float(one @ two) / (na * nb) if na * nb else None]
    return rows


def check(found: dict[str, object], expected: dict[str, list[float | None]]) -> None:
    rows = found["rows"]
    assert isinstance(rows, list)
    assert {row["name"] for row in rows} == expected.keys()
    for row in rows:
        for column, value in zip(COLUMNS, expected[row["name"]], strict=True):
            close = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert row[column] == close
    distances = [float("inf") if row["distance"] is None else row["distance"] for row in rows[:-1]]
    assert distances == sorted(distances, reverse=True)
    assert rows[-1]["name"] == "all"


PAIRS = [
    (1, CONV, AdapterSpec(kind="rslora", rank=2, alpha=1.0, targets=("to_q", "mid_block.*.conv1"))),
    (2, CONV, AdapterSpec(kind="dora", rank=3)),
    (1, AdapterSpec(kind="loha", rank=2), AdapterSpec(kind="oft", rank=4)),
]


@pytest.mark.parametrize("modules", [False, True])
@pytest.mark.parametrize(("stage", "one", "other"), PAIRS, ids=["lora", "dora", "loha"])
def test_blocks_and_modules_are_compared_as_whole_matrices_are(
    random_cascade: RandomCascade,
    tmp_path: Path,
    diff: Callable[..., str],
    stage: int,
    one: AdapterSpec,
    other: AdapterSpec,
    modules: bool,
) -> None:
    base = base_of(random_cascade, stage)
    unets = [trained_unet(base, spec, seed) for seed, spec in enumerate((one, other))]
    a, b = (
        export(unet, tmp_path / name, base, stage, spec).folder
        for unet, name, spec in zip(unets, "ab", (one, other), strict=True)
    )
    flags = ["--json", *["--modules"] * modules]
    needed = [] if (one.kind, other.kind) == ("lora", "rslora") else ["--base", base]
    (found,) = json.loads(diff(a, b, *needed, *flags))
    whole = [updates(unet) for unet in unets]
    check(found, expected_rows(*whole, str if modules else block))
    assert set(found["only_in_a"]) == whole[0].keys() - whole[1].keys()
    assert set(found["only_in_b"]) == whole[1].keys() - whole[0].keys()
    both = whole[0].keys() & whole[1].keys()
    pair = [one.rank, other.rank]
    assert found["ranks"] == {name: pair for name in both if one.rank != other.rank}
    assert found["alphas"].keys() == both


def test_an_adapter_does_not_differ_from_itself(
    random_cascade: RandomCascade, tmp_path: Path, diff: Callable[..., str]
) -> None:
    for stage in (1, 2):
        base = base_of(random_cascade, stage)
        export(trained_unet(base, CONV), tmp_path, base, stage, CONV)
    found = json.loads(diff(tmp_path, tmp_path, "--json"))
    assert len(found) == 2
    for stage in found:
        assert {(row["distance"], row["cosine"]) for row in stage["rows"]} == {(0, 1)}
    told = diff(tmp_path, tmp_path / "stage_2")
    assert told.count("|A - B| / |A|") == 1
    assert "only in" not in told
    assert "differs" not in told


def test_another_tools_adapter_is_held_against_the_stage_it_fits(
    random_cascade: RandomCascade, tmp_path: Path, diff: Callable[..., str]
) -> None:
    file = kohya(trained_unet(random_cascade.stage_1, CONV), tmp_path)
    for stage in (1, 2):
        base = base_of(random_cascade, stage)
        export(trained_unet(base, ATTENTION), tmp_path / "ours", base, stage, ATTENTION)
    told = diff(file, tmp_path / "ours")
    assert f"A          {file}: lora, rank 4, alpha 6, 49 modules" in told
    assert f"B          {tmp_path}/ours/stage_1: lora, rank 4, alpha 4, 24 modules" in told
    assert "only in A  25 modules: down_blocks.0.downsamplers.0.conv1, " in told
    assert "alpha      differs in 24 modules: " in told
    assert " 6 -> 4" in told
    assert "down_blocks.0        4" in told
    assert re.search(r" 0 +1 +-\n", told)  # no cosine with nothing


def test_two_unets_are_compared_weight_by_weight(
    random_cascade: RandomCascade, tmp_path: Path, diff: Callable[..., str]
) -> None:
    base, tuned = random_cascade.stage_1, tmp_path / "tuned"
    unet = load_unet(base)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    unet.mid_block.resnets[0].conv1.weight.data *= 1.5
    unet.up_blocks[0].attentions[0].to_q.bias.data += 0.1
    shutil.copytree(base, tuned)
    unet.save_pretrained(tuned / "unet")
    for place in (tuned, tuned / "unet"):
        (found,) = json.loads(diff(base, place, "--modules", "--json"))
        check(found, expected_rows(before, unet.state_dict(), str))
    told = diff(base, tuned)
    assert told.splitlines()[4].startswith("mid_block ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("{lora}/stage_1 {lora}/stage_2", "are adapters of different stages"),
        ("{lora} {loha}", "of kind loha, whose updates depend on its base"),
        ("{lora} {stage_1}", "is a model, and the other is not"),
        ("{stage_1} {stage_2}", "are UNets of different architectures"),
        ("{lora}/stage_1 {wide}", "has the shape"),
    ],
)
def test_what_cannot_be_compared(
    random_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    sentence: str,
) -> None:
    for stage in (1, 2):
        base = base_of(random_cascade, stage)
        export(trained_unet(base, ATTENTION), tmp_path / "lora", base, stage, ATTENTION)
    loha, base = AdapterSpec(kind="loha"), random_cascade.stage_1
    export(trained_unet(base, loha), tmp_path / "loha", base, 1, loha)
    wide = kohya(trained_unet(base, ATTENTION), tmp_path)
    tensors = load_file(wide)
    for key in [key for key in tensors if key.endswith("lora_down.weight")]:
        tensors[key] = torch.ones(4, tensors[key].shape[1] + 1)
    save_file(tensors, wide)
    places = {**vars(random_cascade), "wide": wide}
    places |= {name: tmp_path / name for name in ("lora", "loha")}
    assert sentence in refusal(capsys, main, *arguments.format(**places).split())
