"""Checkpoints: whole or not there, and the same tree again."""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.checksums import write_sums
from adapters.errors import UserError
from finetune.run import checkpoints as module
from finetune.run.checkpoints import (
    find_newest,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside,
)

TREE = {
    "step": 3,
    "none": None,
    "parameters": {"a.b": torch.arange(6.0).view(2, 3), "half": torch.ones(2).bfloat16()},
    "optimizer": {
        "state": {0: {"m": torch.zeros(4, dtype=torch.uint8), "k": 1}, 1: {}},
        "param_groups": [{"betas": (0.9, 0.99), "params": [0, 1], "on": True}],
    },
}


def assert_same(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert isinstance(theirs, torch.Tensor)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert isinstance(theirs, dict)
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert isinstance(theirs, (list, tuple))
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def test_the_same_tree_comes_back(tmp_path: Path) -> None:
    assert_same(load_checkpoint(save_checkpoint(tmp_path, 3, TREE, keep=1)), TREE)


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    shared = torch.arange(4)
    tree = {"a": shared, "b": shared[:2]}
    assert_same(load_checkpoint(save_checkpoint(tmp_path, 1, tree, keep=1)), tree)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20, 1000):
        save_checkpoint(tmp_path, step, TREE, keep=2)
    kept = ["step-000100", "step-001000"]
    assert [folder.name for folder in list_checkpoints(tmp_path)] == kept


@pytest.mark.parametrize("step", [2, 3])
def test_a_kill_at_any_moment_leaves_whole_checkpoints(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both when the newest step is saved again, and when the next one is."""
    left = always = 1000

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def until_killed(*given: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return call(*given, **options)

        return until_killed

    changing = (
        (module, "save_tensors"),
        (module, "write_sums"),
        (module, "replace_folder"),
        (os, "replace"),
        (os, "unlink"),
    )
    for owner, name in changing:
        monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))
    for moment in range(20):
        root = tmp_path / str(moment)
        for earlier in (1, 2):
            save_checkpoint(root, earlier, TREE, keep=2)
        left = moment
        with suppress(KeyboardInterrupt):
            save_checkpoint(root, step, TREE, keep=2)
        survived, left = left >= 0, always
        whole = list_checkpoints(root)
        assert len(whole) >= 2
        for folder in whole:
            assert_same(load_checkpoint(folder), TREE)
        save_checkpoint(root, 9, TREE, keep=1)
        assert [folder.name for folder in root.iterdir()] == ["step-000009"]
        if survived:
            break
    assert survived
    assert [folder.name for folder in whole] == [f"step-{each:06d}" for each in (step - 1, step)]


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="step-000001 cannot be written"):
        save_checkpoint(tmp_path / "file", 1, TREE, keep=1)


def truncate(folder: Path) -> None:
    for name in ("state.json", "state.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])


def flip_a_bit(folder: Path) -> None:
    """The lowest of the last number, which stays finite."""
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[-4] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def write_a_list(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


def write_a_list_with_its_checksum(folder: Path) -> None:
    write_a_list(folder)
    write_sums(folder, ("state.json", "state.safetensors"))


def write_nan_with_its_checksum(folder: Path) -> None:
    tensors = load_file(folder / "state.safetensors")
    tensors["0"][0] = torch.nan
    save_file(tensors, folder / "state.safetensors")
    write_sums(folder, ("state.json", "state.safetensors"))


def drop_an_entry_with_its_checksum(folder: Path) -> None:
    document = json.loads((folder / "state.json").read_text())
    entries = document["tree"]["mapping"]
    document["tree"]["mapping"] = [entry for entry in entries if entry[0] != "optimizer"]
    (folder / "state.json").write_text(json.dumps(document))
    write_sums(folder, ("state.json", "state.safetensors"))


def remove_the_checksums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def remove_the_tensors(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


DAMAGES = {
    truncate: "other bytes",
    flip_a_bit: "other bytes",
    write_a_list: "other bytes",
    write_a_list_with_its_checksum: "no attribute",
    write_nan_with_its_checksum: r"NaN or infinite values in parameters\.a\.b",
    drop_an_entry_with_its_checksum: "has no optimizer",
    remove_the_checksums: "SHA256SUMS is missing",
    remove_the_tensors: "No such file",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    *_, before, newest = (save_checkpoint(tmp_path, step, TREE, keep=3) for step in (1, 2, 3))
    damage(newest)
    found = find_newest(tmp_path, needs=TREE)
    assert found.folder == before
    assert_same(found.tree, TREE)
    assert found.message is not None
    assert re.search(f"step-000003: .*{DAMAGES[damage]}.* for step-000002", found.message)
    assert "\n" not in found.message
    set_aside(found)
    # neither counted nor in the way when the run is there again
    save_checkpoint(tmp_path, 3, TREE, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert find_newest(tmp_path, needs=TREE).message is None


def test_if_none_is_whole_that_is_said(tmp_path: Path) -> None:
    assert find_newest(tmp_path).message is None
    for step in (1, 2):
        truncate(save_checkpoint(tmp_path, step, TREE, keep=2))
    found = find_newest(tmp_path)
    assert found.folder is None
    assert found.message is not None
    assert found.message.startswith(f"No checkpoint in {tmp_path} is whole (step-000002: ")
    assert found.message.endswith("training begins again at step 0.")


def test_one_of_an_earlier_version_is_said(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, TREE, keep=1)
    document = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(document | {"format": 4}))
    (folder / "SHA256SUMS").unlink()  # which format 4 did not have
    with pytest.raises(UserError, match="has format 4, but this version"):
        find_newest(tmp_path)


def test_one_with_nan_is_not_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, TREE, keep=1)
    with pytest.raises(UserError, match=r"step-000002 was not written.* values in weights\.a;"):
        save_checkpoint(tmp_path, 2, {"weights": {"a": torch.tensor([1, torch.inf])}}, keep=1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000001"]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[tuple[int, int]] = set()
    fsync, replace = os.fsync, os.replace

    def note(handle: int) -> None:
        fsync(handle)
        found = os.fstat(handle)
        flushed.add((found.st_ino, found.st_size))

    def check(old: Path, new: Path) -> None:
        if Path(new).name == "step-000001":
            files = [*Path(old).iterdir()]
            found = {(each.stat().st_ino, each.stat().st_size) for each in files}
            assert found <= flushed
            names.extend(sorted(each.name for each in files))
        replace(old, new)

    names: list[str] = []
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    save_checkpoint(tmp_path, 1, TREE, keep=1)
    assert names == ["SHA256SUMS", "state.json", "state.safetensors"]
    assert tmp_path.stat().st_ino in {inode for inode, _ in flushed}
