"""Environments that no launcher makes, and options of plan, end in one sentence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from finetune.run.environment import check_environment
from finetune.train import main
from tests.builders.commands import refusal
from tests.builders.inputs import Refused, check_refused
from tests.builders.recipes import SMALL, write

LAUNCHED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in LAUNCHED.items() if name not in names}


ADVICE = "start with accelerate launch, or unset it"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "abc"}, "RANK in the environment must be a whole number (got 'abc')"),
        ({"RANK": ""}, "RANK in the environment must be a whole number (got '')"),
        ({"RANK": "0.5"}, "RANK in the environment must be a whole number (got '0.5')"),
        ({"RANK": str(10**30)}, "RANK in the environment must be a whole number"),
        ({"RANK": "9" * 5000}, "RANK in the environment must be a whole number (got '999"),
        ({"RANK": "3"}, "RANK in the environment is 3, but WORLD_SIZE is not set"),
        ({"RANK": "-1"}, "RANK in the environment is -1, but WORLD_SIZE is not set"),
        (LAUNCHED | {"RANK": "2"}, "RANK in the environment is 2, but WORLD_SIZE is 2"),
        (LAUNCHED | {"LOCAL_RANK": "2"}, "LOCAL_RANK in the environment is 2, but LOCAL_WORLD_S"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK in the environment must be a whole number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE in the environment must be a whole number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE in the environment is 2, but LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK in the environment is 0, but RANK is not set"),
        (without("MASTER_ADDR"), "LOCAL_RANK in the environment is 1, but MASTER_ADDR is not set"),
        (without("MASTER_PORT"), "LOCAL_RANK in the environment is 1, but MASTER_PORT is not set"),
        (LAUNCHED | {"MASTER_PORT": "http"}, "MASTER_PORT in the environment must be a whole"),
    ],
    ids=str,
)
def test_an_environment_is_refused(
    variables: Mapping[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sentence = refusal(capsys, main, write(tmp_path, SMALL), "--dry-run")
    assert says in sentence
    assert ADVICE in sentence


@pytest.mark.parametrize(
    "variables",
    [
        {},
        LAUNCHED,
        {"LOCAL_RANK": "-1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"MASTER_ADDR": "node", "MASTER_PORT": "1"},
    ],
    ids=str,
)
def test_an_environment_is_accepted(variables: Mapping[str, str]) -> None:
    check_environment(variables)


def plan_options(name: str, arguments: Sequence[str], *says: str) -> Refused:
    """The embedded cascade's recipe, and options of plan."""
    return Refused(name, lambda folder: ("recipes/quickstart.yaml", *arguments), says)


PLANS = (
    plan_options("memory in words", ["--vram", "much"], "--vram must be the memory of a card"),
    plan_options("endless memory", ["--vram", f"{10**30}GB"], "--vram must be the memory of"),
    plan_options("no memory", ["--vram", ""], "--vram must be the memory of a card", "(got '')"),
    plan_options("less than none", ["--vram=-3GB"], "--vram must be the memory", "(got '-3GB')"),
    plan_options("a rate of nan", ["--rate", "nan"], "--rate must be a number above 0", "got nan"),
    plan_options("an endless rate", ["--rate", "inf"], "--rate must be a number above 0"),
    plan_options("no rate", ["--rate", "0"], "--rate must be a number above 0"),
    plan_options("a card and a CPU", ["--vram", "8GB", "--device", "cpu"], "leave out --device"),
    plan_options(
        "a batch without end", ["--vram", "8GB", "stage_1.batch_size=1000000000"], "at most 10,000"
    ),
)


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case.name)
def test_options_of_plan_are_refused(
    case: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.plan import main as plan

    check_refused(case, plan, tmp_path, capsys)
