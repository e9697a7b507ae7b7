"""What is said of a folder of pictures before training on it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapters.errors import UserError
from finetune.proposal.survey import survey

SIZE_PX = 64


def picture(seed: int, width: int = 90, height: int = 80) -> Image.Image:
    """A picture of large coloured blocks, which differ between seeds."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(4):
        picture(seed).save(folder / f"{seed}.png")
    return folder


def problems(folder: Path, *, subject: bool = True) -> str:
    found = survey(folder, folder.parent / "cache", SIZE_PX)
    return "\n".join(found.find_problems(subject=subject))


def test_nothing_is_said_of_good_pictures(folder: Path) -> None:
    found = survey(folder, folder.parent / "cache", SIZE_PX)
    assert not found.captioned
    assert dict(found.describe())["pictures"].startswith("4 in ")
    assert problems(folder) == ""


def test_pictures_that_teach_less_than_they_seem_are_named(folder: Path) -> None:
    picture(5, 40, 50).save(folder / "small.png")
    picture(6, 300, 80).save(folder / "long.png")
    (folder / "clip.mov").write_bytes(b"film")
    (folder / "same.png").write_bytes((folder / "0.png").read_bytes())
    picture(1).resize((180, 160)).save(folder / "scaled.jpg", quality=70)
    said = problems(folder)
    assert "Smaller than 64 px, and enlarged, which teaches blur:" in said
    assert "More than 2 times as long as wide, and cropped to a square:" in said
    assert "The same: 0.png and same.png" in said
    assert "Nearly the same: 1.png and scaled.jpg" in said
    assert "Left out, as no pictures are of this kind:" in said
    assert len(said.splitlines()) == 5


def test_the_number_of_pictures_matters_for_a_subject_alone(folder: Path) -> None:
    for seed in (0, 1):
        (folder / f"{seed}.png").unlink()
    assert "2 picture(s) are few" in problems(folder)
    assert problems(folder, subject=False) == ""


def test_captions_are_counted(folder: Path) -> None:
    for seed in range(4):
        (folder / f"{seed}.txt").write_text("a sks dog" if seed else "a sks dog at sea")
    found = survey(folder, folder.parent / "cache", SIZE_PX)
    assert found.captions == ["a sks dog at sea", "a sks dog"]
    assert "Left out" not in problems(folder)


def test_a_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        survey(tmp_path / "none", tmp_path / "cache", SIZE_PX)
