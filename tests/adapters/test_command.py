"""Every command says at once what it does, with an example that its parser takes."""

import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest

from adapters import command
from tests.builders import ROOT

COMMANDS = (
    *("generate", "encode", "inspect", "diff", "merge", "resize", "extract", "combine"),
    *("repair", "push", "card"),
)

HELP = """
import sys
from importlib import import_module

for name in sys.argv[1:]:
    try:
        import_module(f"adapters.{name}").main(["--help"])
    except SystemExit as done:
        assert done.code == 0
slow = {"torch", "diffusers", "transformers", "peft", "datasets", "accelerate", "bitsandbytes"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
"""


def test_help_imports_nothing_that_is_slow_to_import() -> None:
    arguments = [sys.executable, "-c", HELP, *COMMANDS]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [*re.findall(r"usage: python -m adapters\.(\w+) ", done.stdout)] == [*COMMANDS]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_is_one_that_the_parser_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, parsed = import_module(f"adapters.{name}"), []
    with pytest.raises(SystemExit):
        module.main(["--help"])
    example = capsys.readouterr().out.rpartition(f"python -m adapters.{name} ")[2]

    def parse(parser: object, arguments: list[str], work: object) -> None:
        parsed.append(parser.parse_args(arguments))

    monkeypatch.setattr(module, "run_command", parse)
    module.main(shlex.split(example))
    assert len(parsed) == 1


def test_a_result_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    parser = command.command_parser("x", "Do it.", "--rank 2", "--rank", "--json")
    command.run_command(parser, ["--rank", "2"], lambda options: f"{options.rank} {options.json}")
    assert capsys.readouterr().out == "2 False\n"
