"""Checkpoints: whole or not there, and the same tree again."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import UserError
from finetune.run import checkpoints as module
from finetune.run.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint

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

    changing = ((module, "save_file"), (module, "replace_folder"), (os, "replace"), (os, "unlink"))
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


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_one_says_so(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, 1, TREE, keep=1)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged.*delete that folder"):
        load_checkpoint(folder)
