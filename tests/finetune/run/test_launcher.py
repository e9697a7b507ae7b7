"""What the launcher was asked for is done, refused, or said to have no effect."""

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from finetune.run.launcher import check_launcher
from finetune.train import main
from tests.builders.commands import refusal

CONFIGURATIONS = Path("recipes/accelerate")


def environment_of(*options: str) -> dict[str, str]:
    """What Accelerate's launcher sets for its processes with some options."""
    arguments = launch_command_parser().parse_args([*options, "script.py"])
    validated, _, _ = _validate_launch_command(arguments)
    return prepare_multi_gpu_env(validated)


ALONE = ("--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no")
PLAIN = ("--multi_gpu", *ALONE)


def test_a_plain_launch_asks_for_nothing_else() -> None:
    assert check_launcher(environment_of(*PLAIN, "--mixed_precision", "no")) == []


def test_a_precision_of_the_launcher_is_said_to_have_no_effect() -> None:
    (said,) = check_launcher(environment_of(*PLAIN, "--mixed_precision", "bf16"))
    assert said.startswith("The launcher's mixed_precision (bf16) has no effect")


def test_an_engine_that_shards_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = environment_of(*ALONE, "--mixed_precision", "no", "--use_fsdp")
    for name in asked.keys() - os.environ.keys():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, asked[name])
    said = refusal(capsys, main, "recipes/quickstart.yaml", f"runs_dir={tmp_path}")
    assert "asked for FSDP" in said
    assert "--multi_gpu" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", sorted(CONFIGURATIONS.iterdir()), ids=lambda file: file.stem)
def test_shipped_configurations_are_accelerates(file: Path) -> None:
    loaded = load_config_from_file(str(file))
    text = file.read_text()
    assert f"--config_file {file}" in text
    processes = {"2_gpus": 2, "4_gpus": 4, "8_gpus": 8, "two_nodes": 16}
    assert loaded.num_processes == processes[file.stem]
    assert loaded.distributed_type == DistributedType.MULTI_GPU
    assert loaded.mixed_precision == "no"
