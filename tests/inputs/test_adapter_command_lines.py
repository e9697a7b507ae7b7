"""A few of the refused inputs as real command lines, with all that libraries print in front."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.weights.kinds import AdapterSpec
from tests.builders import ROOT
from tests.builders.adapters import export, trained_unet
from tests.builders.drawing import picture
from tests.builders.random_cascade import RandomCascade

AT_ONCE = 2
"""The number of commands that run at the same time."""

REFUSED: dict[str, tuple[str, Sequence[str]]] = {
    "an endless pattern": ("inspect endless", ["endless", "patterns of module names", "3 seconds"]),
    "a module to import": ("inspect import", ["its megatron_co", "cannot be merged"]),
    "a setting of the future": ("inspect future", ["its use_new are no settings", "update PEFT"]),
    "half of a file": ("inspect cut", ["cut/stage_1/adapter_model", "cannot be read"]),
    "an adapter that is not there": ("inspect nowhere", ["nowhere has no exported adapter"]),
    "a scale": ("merge dog --scale inf --out new", ["--scale must be a number", "(got inf)"]),
    "a full folder": ("merge dog --out dog", ["dog already exists", "name a new folder"]),
    "a rank": ("combine dog dog --method svd --rank 99999999 --out new", ["1 to 10000"]),
    "an option": ("resize dog --rnak 1 --out new", ["unrecognized arguments: --rnak", "--rank?"]),
    "a long prompt": (
        f"encode {{base}} --prompt {'x' * 100_000} --out new",
        ["has 100,000 letters", "shorten it"],
    ),
    "guidance": (
        "generate --stage-1 {base} --prompt cat --stage-1-guidance inf --out new",
        ["--stage-1-guidance: must be", "(got inf)"],
    ),
    "a damaged base": (
        "generate --stage-1 damaged --prompt cat --adapter dog --out new",
        ["damaged"],
    ),
    "a picture": (
        "generate --stage-1 {base} --prompt cat --image line.png --out new",
        ["at most 4 times", "1 x 2000 px"],
    ),
    "a picture without a record": ("generate --like line.png --out new", ["line.png does not say"]),
}


@pytest.fixture(scope="module")
def folder(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the commands run in."""
    root, base, spec = tmp_path_factory.mktemp("lines"), random_cascade.stage_1, AdapterSpec(rank=2)
    export(trained_unet(base, spec), root / "dog", base, 1, spec)
    changes = {
        "endless": {"rank_pattern": {r"(.|..)+(?<=!)": 1}},
        "import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        "future": {"use_new": True},
        "cut": {},
    }
    for name, settings in changes.items():
        file = Path(shutil.copytree(root / "dog", root / name)) / "stage_1/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    weights = root / "cut/stage_1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    damaged = Path(shutil.copytree(base, root / "damaged"))
    (damaged / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    picture(width=1, height=2000).save(root / "line.png")
    return root


def test_they_end_in_one_sentence(folder: Path, random_cascade: RandomCascade) -> None:
    before = sorted(folder.rglob("*"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command, *arguments = REFUSED[name][0].format(base=random_cascade.stage_1).split(" ")
        line = [sys.executable, "-m", f"adapters.{command}", *arguments]
        return subprocess.run(
            line, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    with ThreadPoolExecutor(AT_ONCE) as threads:
        for name, done in zip(REFUSED, threads.map(run, REFUSED), strict=True):
            assert done.returncode == 2, (name, done.stderr)
            assert done.stdout == "", name
            assert done.stderr.startswith("error: "), (name, done.stderr)
            assert done.stderr.count("\n") == 1, (name, done.stderr)
            missing = [part for part in REFUSED[name][1] if part not in done.stderr]
            assert missing == [], (name, done.stderr)
    assert sorted(folder.rglob("*")) == before
