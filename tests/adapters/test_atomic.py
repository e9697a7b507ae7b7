"""Writers: what they leave behind when they are killed, and what of it is cleared away."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.atomic import TEMPORARY, clear_leftovers, new_folder, replacing, temporary_folder


def in_a_file(folder: Path, work: Callable[[], None]) -> None:
    with replacing(folder / "kept.npy") as temporary:
        temporary.write_text("half")
        work()


def in_a_folder(folder: Path, work: Callable[[], None]) -> None:
    with temporary_folder(folder) as temporary:
        (temporary / "half").write_text("half")
        work()


def in_a_new_folder(folder: Path, work: Callable[[], None]) -> None:
    with new_folder(folder / "new") as temporary:
        (temporary / "half").write_text("half")
        work()


def list_temporary(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("write", [in_a_file, in_a_folder, in_a_new_folder])
def test_only_what_killed_writers_left_is_cleared(
    write: Callable[[Path, Callable[[], None]], None], tmp_path: Path
) -> None:
    place = tmp_path / "deep" / "inside"
    place.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        write(place, lambda: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(child, 0)
    (left,) = list_temporary(tmp_path)

    def clear_beside_the_living() -> None:
        assert len(list_temporary(tmp_path)) == 2
        clear_leftovers(tmp_path)
        (mine,) = list_temporary(tmp_path)
        assert mine != left

    write(place, clear_beside_the_living)
    assert list_temporary(tmp_path) == []


def test_what_is_no_leftover_stays(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".hidden", "partial-1", "a" + TEMPORARY)]
    for file in kept:
        file.write_text("")
    clear_leftovers(tmp_path)
    clear_leftovers(tmp_path / "nowhere")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
