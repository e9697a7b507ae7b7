"""A few of the refused inputs as real command lines, with all that libraries print."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.builders import ROOT
from tests.builders.material import BASE, SOURCE, training

AT_ONCE = 2
"""The number of commands that run at the same time."""


@dataclass(frozen=True)
class Command:
    """A command line that ends in one sentence."""

    name: str
    module: str
    arrange: Callable[[Path], Sequence[str]]
    says: Sequence[str]


def pictures(folder: Path, **files: bytes) -> Path:
    """Write a good picture, and other files beside it."""
    place = folder / SOURCE
    place.mkdir()
    Image.new("RGB", (40, 40), "red").save(place / "a.png")
    for name, content in files.items():
        (place / name.replace("_", ".")).write_bytes(content)
    return place


def trained(*overrides: str, **files: bytes) -> Callable[[Path], list[str]]:
    def arrange(folder: Path) -> list[str]:
        pictures(folder, **files)
        return training(folder, *overrides)

    return arrange


def surveyed(**files: bytes) -> Callable[[Path], list[str]]:
    def arrange(folder: Path) -> list[str]:
        place = pictures(folder, **files)
        return [str(place), "--subject", "dog", "--base", str(BASE.parent), "--name", "x"]

    return arrange


def drawn(option: str, content: bytes) -> Callable[[Path], list[str]]:
    def arrange(folder: Path) -> list[str]:
        (folder / "given.png").write_bytes(content)
        given = [option, str(folder / "given.png"), "--out", str(folder / "out")]
        return ["--prompt", "a dog", "--stage-1", str(BASE), *given]

    return arrange


def piped(folder: Path) -> list[str]:
    place = pictures(folder)
    os.mkfifo(place / "a.txt")
    return training(folder)


def tabled(folder: Path) -> list[str]:
    (folder / SOURCE).mkdir()
    (folder / SOURCE / "a.json").write_bytes(b"{")
    return training(folder)


ONE = "data.prompt=a dog"
DATA = [
    Command(
        "a damaged picture", "finetune.train", trained(ONE, b_png=b"no"), ["b.png cannot be read"]
    ),
    Command("no captions", "finetune.train", trained(), ["a.png has no caption"]),
    Command(
        "a caption that is emptied", "finetune.train", trained(a_txt=b"<sks>"), ["leaves no word"]
    ),
    Command(
        "a broken list", "finetune.train", trained(metadata_jsonl=b"{"), ["metadata.jsonl, line 1"]
    ),
    Command("no folder", "finetune.train", trained(ONE, "data.source=./no"), ["no such folder"]),
    Command(
        "a broken class picture",
        "finetune.train",
        trained(ONE, "prior={folder: 'no', prompts: [a cat]}"),
        ["prior.folder"],
    ),
    Command("a pipe for a caption", "finetune.precompute", piped, ["a.txt", "found a pipe"]),
    Command("a broken table", "finetune.precompute", tabled, ["cannot be loaded"]),
    Command(
        "half a picture",
        "finetune.init",
        surveyed(b_jpg=b"\xff\xd8\xff\xe0"),
        ["b.jpg cannot be read"],
    ),
    Command(
        "a caption in UTF-16",
        "finetune.init",
        surveyed(a_txt="ö".encode("utf-16")),
        ["a.txt", "UTF-16"],
    ),
    Command(
        "no picture to start from",
        "adapters.generate",
        drawn("--image", b"no"),
        ["given.png cannot be read"],
    ),
    Command(
        "no picture to enlarge",
        "adapters.generate",
        drawn("--low-res", b""),
        ["given.png cannot be read"],
    ),
]


def run(command: Command, folder: Path) -> tuple[subprocess.CompletedProcess[str], set[Path]]:
    arguments = command.arrange(folder)
    before = set(folder.rglob("*"))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    elsewhere = folder.parent / f"{folder.name}-here"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", command.module, *arguments],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, set(folder.rglob("*")) ^ before


def test_commands_end_in_one_sentence(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(DATA))]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(run, DATA, folders))
    for command, (done, changed) in zip(DATA, outcomes, strict=True):
        assert done.returncode == 2, (command.name, done.stderr)
        assert done.stdout == "", command.name
        assert done.stderr.startswith("error: "), (command.name, done.stderr)
        assert done.stderr.count("\n") == 1, (command.name, done.stderr)
        assert [part for part in command.says if part not in done.stderr] == [], done.stderr
        assert not changed, (command.name, changed)
