"""Fixtures that several test modules share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from tests.builders.random_cascade import RandomCascade, save_random_cascade

torch.set_num_threads(1)  # models this small lose more than they win by a second thread


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep runs in this process from taking all cores, which tests after them would then share."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        yield


def pytest_collection_finish() -> None:
    """Spare garbage collections all that is imported by now, which takes each half a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let go of it again, so that it is cleared away at the end of the process."""
    gc.unfreeze()


SLOWEST = (
    "finetune/test_kills.py",
    "finetune/test_outcome.py",
    "finetune/test_train.py",
    "finetune/test_sweep.py",
    "finetune/test_stopped_launches.py",
    "docs/test_notebooks.py",
    "docs/test_commands.py",
    "docs/test_site.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, so that no worker ends alone with one of them."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU on machines without one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="module")
def no_plan() -> Iterator[None]:
    """Spare runs in this process their estimate of memory, which takes seconds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("finetune.train.print_plan", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def random_cascade(tmp_path_factory: pytest.TempPathFactory) -> RandomCascade:
    """A random cascade of 16 px, 64 px and the x4 upscaler."""
    return save_random_cascade(tmp_path_factory.mktemp("random_cascade"))


@pytest.fixture(scope="session")
def guarded_cascade(tmp_path_factory: pytest.TempPathFactory) -> RandomCascade:
    """A random cascade with a safety checker and a watermarker."""
    return save_random_cascade(tmp_path_factory.mktemp("guarded_cascade"), guarded=True, seed=1)
