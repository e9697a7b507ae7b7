"""Every command says at once what it does, with an example that its parser takes."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from io import StringIO

import pytest

from adapters import command, errors
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


def test_what_an_option_with_several_values_has_taken_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, said in (
        (["--targets", "attention", "tuned"], True),
        (["--rank", "2"], False),
    ):
        with pytest.raises(SystemExit, match="2"):
            import_module("adapters.extract").main(arguments)
        error = capsys.readouterr().err
        assert "the following arguments are required" in error
        assert ("--targets takes all values that follow it" in error) == said


class Terminal(StringIO):
    """A stream that a person watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "rank", "said"),
    [(Terminal(), "0", "Loading"), (Terminal(), "1", ""), (StringIO(), "0", "")],
)
def test_a_person_is_told_once_that_libraries_are_loading(
    stream: StringIO, rank: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", rank)
    errors.say_loading.cache_clear()
    errors.say_loading()
    errors.say_loading()
    assert stream.getvalue().startswith(said)
    assert stream.getvalue().count("\n") == bool(said)
