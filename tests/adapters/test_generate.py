"""The command line draws, writes, and explains mistakes in one sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapters.cascade.provenance import read_picture_info
from adapters.errors import command_line
from adapters.generate import main
from adapters.pictures.contact_sheet import contact_sheet
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.commands import refusal
from tests.builders.random_cascade import RandomCascade

STEPS = ["--stage-1-steps", "2", "--stage-2-steps", "2", "--stage-3-steps", "2"]


@pytest.fixture(scope="module")
def adapter(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    for stage, base in ((1, random_cascade.stage_1), (2, random_cascade.stage_2)):
        export(trained_unet(base, AdapterSpec()), folder, base, stage, AdapterSpec())
    return folder


def test_it_writes_every_stage_and_a_contact_sheet(
    random_cascade: RandomCascade, adapter: Path, tmp_path: Path
) -> None:
    arguments = f"--adapter {adapter} --stage-3 {random_cascade.stage_3} --seed 7 --out {tmp_path}"
    main([*arguments.split(), *STEPS, "--prompt", "a sks Cat!", "--prompt", "a dog"])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"contact_sheet.png"} | {
        f"{picture}-stage_{stage}.png"
        for picture in ("000-a-sks-cat-seed7", "001-a-dog-seed8")
        for stage in (1, 2, 3)
    }
    picture = Image.open(tmp_path / "000-a-sks-cat-seed7-stage_2.png")
    assert picture.size == (64, 64)
    assert (picture.text["prompt"], picture.text["seed"]) == ("a sks Cat!", "7")


def test_later_stages_are_told_what_is_given(random_cascade: RandomCascade, tmp_path: Path) -> None:
    stages = (random_cascade.stage_1, random_cascade.stage_2, random_cascade.stage_3)
    models = [part for n, path in enumerate(stages, 1) for part in (f"--stage-{n}", str(path))]
    prompts = ["--prompt", "a sks cat", "--prompt", "a sks dog"]
    told = ["--stage-2-prompt", "a cat", "--stage-2-prompt", "a dog", "--stage-3-prompt", "a pet"]
    main([*models, *STEPS, *prompts, *told, "--out", str(tmp_path)])
    found = {
        (row, stage): read_picture_info(next(tmp_path.glob(f"{row}-*-stage_{stage}.png"))).prompt
        for row in ("000", "001")
        for stage in (1, 2, 3)
    }
    assert list(found.values()) == ["a sks cat", "a cat", "a pet", "a sks dog", "a dog", "a pet"]


def test_scale_zero_is_the_base(
    random_cascade: RandomCascade, adapter: Path, tmp_path: Path
) -> None:
    base = ["--stage-1", str(random_cascade.stage_1), "--prompt", "a cat", *STEPS]
    runs = {
        "base": [],
        "zero": ["--adapter", str(adapter / "stage_1"), "--scale", "0"],
        "one": ["--adapter", str(adapter / "stage_1")],
    }
    pictures = {}
    for name, extra in runs.items():
        main([*base, *extra, "--out", str(tmp_path / name)])
        pictures[name] = np.asarray(Image.open(tmp_path / name / "000-a-cat-seed0-stage_1.png"))
    assert np.array_equal(pictures["zero"], pictures["base"])
    assert not np.array_equal(pictures["one"], pictures["base"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stage-1", "no/such/place"], "'no/such/place' is neither a folder"),
        (["--adapter", "nowhere"], "nowhere has no exported adapter"),
        ([], "name at least one model"),
        (["--stage-1", "x/y", "--noise-level", "-1"], "--noise-level: must be at least 0 (got -1)"),
        (["--stage-1", "x/y", "--device", "foo"], "device 'foo' cannot be used"),
        (["--stage-1", "x/y", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--stage-1", "x/y", "--device", "meta"], "device 'meta' cannot be used"),
        (["--stage-1", "x/y", "--seed", "-1"], "whole number from 0 to 18446744073709551615"),
        (["--stage-1", "x/y", "--seed", str(2**64)], "(got 18446744073709551616)"),
        (["--stage-1", "x/y", "--prompt", "a\udcff"], "has a byte that is not UTF-8"),
        (["--stage-1", "x/y", "--memory", "6GB", "--device", "cpu"], "is for a GPU"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refusal(capsys, main, *arguments, "--prompt", "a cat", "--out", tmp_path)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("{file}", "must be a folder, but is a file"),
        ("{file}/below", "cannot be written (Not a directory)"),
        ("/proc/x", "/proc/x cannot be written (No such file or directory)"),
        ("{file}" + "x" * 300, "cannot be written (File name too long)"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    place: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("adapters.cascade.load.load_cascade", refuse)
    (tmp_path / "file").write_text("mine")
    flags = ["--stage-1", "x/y", "--prompt", "a", "--out", place.format(file=tmp_path / "file")]
    assert sentence in refusal(capsys, main, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_the_disk_refuses_later_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, command_line():
        Path("/proc/x/y").mkdir()
    assert caught.value.code == 2
    assert "error: The system reported an error ([Errno 2] No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images-per-prompt", "0"], "nothing to draw"),
        (["--stage-1-steps", "5000"], "stage_1.steps is 5000, but this cascade allows 1000"),
        (["--noise-level", "1000"], "noise_level is 1000, but this cascade allows 999"),
        (["--stage-3-noise-level", "351"], "stage_3.noise_level is 351, but this cascade allows 3"),
        (["--seed", str(2**64 - 1), "--images-per-prompt", "2"], "(got 18446744073709551616)"),
        (["--stage-2-prompt", "a", "--stage-2-prompt", "b"], "one for each of the 1 (got 2)"),
    ],
)
def test_mistakes_that_only_the_models_tell(
    random_cascade: RandomCascade,
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = [random_cascade.stage_1, random_cascade.stage_2, random_cascade.stage_3]
    models = [part for n, path in enumerate(stages, 1) for part in (f"--stage-{n}", str(path))]
    assert sentence in refusal(
        capsys, main, *models, *arguments, "--prompt", "a cat", "--out", tmp_path
    )


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, command_line():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_contact_sheet_shows_every_picture() -> None:
    colours = ["red", "lime", "blue"]
    rows = [[Image.new("RGB", (8, 8), colour) for colour in colours], [Image.new("L", (500, 250))]]
    sheet = contact_sheet(
        rows,
        row_captions=["first", "second"],
        captions=[["a caption of so many words that it has to be broken"] * 3, ["b"]],
        title="a title",
        cell_px=100,
    )
    shown = {colour for _, colour in sheet.getcolors(maxcolors=2**20)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)} <= shown
    assert sheet.getpixel((sheet.width - 1, 0)) == (255, 255, 255)
    counts = {colour: count for count, colour in sheet.getcolors(maxcolors=2**20)}
    assert counts[(255, 0, 0)] == counts[(0, 255, 0)] == counts[(0, 0, 255)] == 100 * 100
