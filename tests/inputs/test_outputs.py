"""Names of what is written: odd ones are taken literally, impossible ones refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters import Cascade, UserError, load_cascade, load_embeds, read_picture_info, save_embeds
from adapters.atomic import check_out
from adapters.cascade.results import CascadeImages, picture_name
from adapters.checksums import SUMS, read_sums, write_sums
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.drawing import FEW_STEPS
from tests.builders.random_cascade import RandomCascade


@pytest.fixture(scope="module")
def cascade(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    folder, spec = tmp_path_factory.mktemp("dog"), AdapterSpec(rank=2)
    base = random_cascade.stage_1
    export(trained_unet(base, spec), folder, base, 1, spec)
    return load_cascade(base, adapters={folder: 0.5}, device="cpu")


@pytest.fixture(scope="module")
def images(cascade: Cascade) -> CascadeImages:
    return cascade("a / ../../cat?*", sampling=FEW_STEPS, progress=False)


Save = Callable[[Cascade, CascadeImages, Path], object]

REFUSED: dict[str, tuple[Save, str]] = {
    "a picture of another format": (lambda c, i, f: i[0].save(f / "a.jpg"), "must end in .png"),
    "a picture without an ending": (lambda c, i, f: i[0].save(f / "a"), "must end in .png"),
    "a picture at a folder": (lambda c, i, f: i[0].save(f / "folder.png"), "cannot be written"),
    "a picture below a file": (lambda c, i, f: i[0].save(f / "file" / "a.png"), "cannot be writ"),
    "a picture of a long name": (lambda c, i, f: i[0].save(f / f"{'x' * 300}.png"), "too long"),
    "a picture of NUL": (lambda c, i, f: i[0].save(f / "a\0.png"), "NUL"),
    "a picture at nobody's home": (lambda c, i, f: i[0].save("~nobody_here/a.png"), "no user's ho"),
    "pictures below a file": (lambda c, i, f: i.save(f / "file"), "cannot be written"),
    "pictures of NUL": (lambda c, i, f: i.save(f / "a\0"), "NUL"),
    "an adapter in a full folder": (lambda c, i, f: c.save_adapter(name(c), f), "already exists"),
    "an adapter at a file": (lambda c, i, f: c.save_adapter(name(c), f / "file"), "already exists"),
    "an adapter of another name": (
        lambda c, i, f: c.save_adapter("x", f / "x"),
        "No adapter is ca",
    ),
    "an adapter of NUL": (lambda c, i, f: c.save_adapter(name(c), f / "a\0"), "NUL"),
    "encodings of other numbers": (
        lambda c, i, f: save_embeds(f / "e", ["a"], torch.ones(2, 5, 32)),
        r"one encoding for each of 1 prompts \(got 2\)",
    ),
    "encodings of no numbers": (
        lambda c, i, f: save_embeds(f / "e", ["a"], torch.full((1, 5, 32), float("nan"))),
        "NaN or infinite",
    ),
    "encodings at a folder": (
        lambda c, i, f: save_embeds(f / "folder.png", ["a"], torch.ones(1, 5, 32)),
        "cannot be written",
    ),
    "a new folder at a soft link to itself": (
        lambda c, i, f: [(f / "loop").symlink_to("loop"), check_out(f / "loop" / "x", "folder")],
        "cannot be written",
    ),
}


def name(cascade: Cascade) -> str:
    (only,) = cascade.adapters
    return only


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_said_and_leaves_nothing(
    case: str, cascade: Cascade, images: CascadeImages, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    save, says = REFUSED[case]
    with pytest.raises(UserError, match=says) as caught:
        save(cascade, images, tmp_path)
    assert "\n" not in str(caught.value)
    left = {path.name for path in tmp_path.rglob("*") if not path.is_symlink()}
    assert left == {"folder.png", "file"}


NAMES = ["a b", "[x]", "a::b", "$HOME", "ü 狗", "-x", "a=1", ".hidden", "x" * 200, "100%"]


@pytest.mark.parametrize("folder", NAMES)
def test_odd_names_are_taken_literally(
    folder: str, cascade: Cascade, images: CascadeImages, tmp_path: Path
) -> None:
    place = tmp_path / folder
    images.save(place)
    images[0].save(place / f"{folder}.png")
    assert read_picture_info(place / f"{folder}.png") == images.infos[0]
    cascade.save_adapter(name(cascade), place / "adapter")
    again = cascade.add_adapter(place / "adapter", 0.0, name="again")
    cascade.remove_adapter(again)
    save_embeds(place / folder, ["a", ""], torch.ones(2, 5, 32))
    assert list(load_embeds(place / folder)) == ["a", ""]


def test_a_pictures_name_never_leaves_its_folder(images: CascadeImages, tmp_path: Path) -> None:
    images.save(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    for prompt in ("../../x", "/etc/passwd", "..", "", "狗", "x" * 10_000, "a\nb\0c", "CON"):
        stem = picture_name(0, prompt, 2**64 - 1)
        assert set(stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert len(stem) < 100


@pytest.mark.parametrize("outside", ["../secret", "/etc/passwd", "a/../../secret", "a\0b"])
def test_checksums_of_files_elsewhere_are_none(outside: str, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("own")
    write_sums(tmp_path, ["own"])
    assert list(read_sums(tmp_path)) == ["own"]
    with (tmp_path / SUMS).open("a") as stream:
        stream.write(f"{'0' * 64}  {outside}\n")
    assert read_sums(tmp_path) == {}
