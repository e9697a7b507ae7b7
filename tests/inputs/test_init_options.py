"""Options of finetune.init that end in one sentence before any picture is read."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from finetune.init import main
from tests.builders import ROOT
from tests.builders.inputs import Refused, check_refused

LONG = "x" * 120_000
TINY = ROOT / "models/if-tiny"


def options(name: str, arguments: Sequence[object], *says: str) -> Refused:
    """A folder with a picture, and options."""

    def arrange(folder: Path) -> Sequence[object]:
        return photos(folder), "--base", TINY, "--subject", "dog", *arguments

    return Refused(name, arrange, says)


def place(name: str, make: Callable[[Path], object], *says: str) -> Refused:
    """A folder of pictures that is made in some way."""

    def arrange(folder: Path) -> Sequence[object]:
        make(folder / "photos")
        return folder / "photos", "--base", TINY, "--subject", "dog"

    return Refused(name, arrange, ("photos", *says))


def base(name: str, make: Callable[[Path], object], *says: str) -> Refused:
    """A base that is made in some way."""

    def arrange(folder: Path) -> Sequence[object]:
        make(folder / "base")
        return photos(folder), "--base", folder / "base", "--subject", "dog"

    return Refused(name, arrange, says)


def out(name: str, make: Callable[[Path], object], *says: str) -> Refused:
    """A place for the recipe that is made in some way."""

    def arrange(folder: Path) -> Sequence[object]:
        make(folder / "dog.yaml")
        arguments = ("--base", TINY, "--subject", "dog", "--out", folder / "dog.yaml")
        return photos(folder), *arguments

    return Refused(name, arrange, ("dog.yaml", *says))


def photos(folder: Path) -> Path:
    made = folder / "photos"
    made.mkdir()
    Image.new("RGB", (128, 128), (200, 30, 30)).save(made / "dog.png")
    return made


def broken_base(folder: Path) -> None:
    (folder / "stage_1/unet").mkdir(parents=True)
    (folder / "stage_1/model_index.json").write_text('{"_class_name": "IFPipeline"}')
    (folder / "stage_1/unet/config.json").write_text('{"sample_size": 0}')


CASES = (
    place("no folder", lambda path: None, "is not a folder: name the one with your pictures in it"),
    place("a file", lambda path: path.write_text("a"), "is not a folder"),
    options("no subject", ["--subject", ""], "--subject is empty; write some text"),
    options("a blank subject", ["--subject", " "], "--subject has no visible character"),
    options("a NUL", ["--subject", "a\0b"], "--subject has a NUL character"),
    options("a surrogate", ["--subject", "a\udcff"], "--subject has a byte that is not UTF-8"),
    options("a long subject", ["--subject", "x" * 201], "--subject must be a few words, of 200"),
    options("a blank name for it", ["--identifier", "\u200b"], "--identifier has no visible"),
    options("a long name for it", ["--identifier", "x" * 201], "--identifier must be a few words"),
    options("no name", ["--name", ""], "--name must be at most 100 letters, digits", "(got '')"),
    options("a name with spaces", ["--name", "my dog"], "--name must be", "(got 'my dog')"),
    options("a name that leads up", ["--name", "../dog"], "--name must be", "(got '../dog')"),
    options("a long name", ["--name", LONG], "--name must be at most 100 letters", "120,000"),
    options("memory in words", ["--memory", "much"], "--memory must be the memory of a card"),
    options("no memory", ["--memory", "0GB"], "--memory must be the memory of a card"),
    options("endless memory", ["--memory", f"{10**30}GB"], "--memory must be the memory of a card"),
    options("an unknown home", ["--base", "~nobody_of_this_name/if"], "no user's home folder"),
    options("no base", ["--base", "gone"], "--base gone must be a folder with stage_1 in it"),
    base("an empty base", Path.mkdir, "must be a folder with stage_1 in it"),
    base("a broken base", broken_base, "sample_size in its unet/config.json must be at least 1"),
    out("a recipe there", lambda path: path.write_text("a"), "already exists: name another"),
    out("a folder there", Path.mkdir, "must be a file, but is a folder"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_options_are_refused(
    case: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    elsewhere = tmp_path / "work"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # its cache is in the current folder
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    check_refused(case, main, inputs, capsys)
