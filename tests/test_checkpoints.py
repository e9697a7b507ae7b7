"""Checkpoints: whole or not there, and the same tree again."""

from pathlib import Path

import pytest
import torch

from adapters.errors import UserError
from finetune.checkpoints import checkpoints, load_checkpoint, save_checkpoint

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
    assert [step for step, _ in checkpoints(tmp_path)] == [100, 1000]


def test_a_partial_checkpoint_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, TREE, keep=2)
    (tmp_path / "partial-000002").mkdir()
    (tmp_path / "partial-000002" / "state.json").write_text("{")
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    save_checkpoint(tmp_path, 2, TREE, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_one_says_so(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, 1, TREE, keep=1)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged.*delete that folder"):
        load_checkpoint(folder)
