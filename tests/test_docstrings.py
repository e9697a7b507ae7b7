"""The examples in the docstrings of the public API are run, on the embedded cascade."""

import doctest
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
import torch
from diffusers import UNet2DConditionModel

import adapters
from adapters import AdapterSpec, Cascade, load_cascade
from tests.builders import ROOT
from tests.builders.adapters import export, trained_unet

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(module.name for module in walk_packages(adapters.__path__, "adapters."))
FOUND = {
    test.name: module
    for module in MODULES
    for test in doctest.DocTestFinder().find(import_module(module))
    if test.examples
}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cascade]:
    """The embedded cascade, in a folder with it and with a run's adapters."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("notebook"))
        Path("models").symlink_to(ROOT / "models")
        for stage in (1, 2):
            base = Path(f"models/if-tiny/stage_{stage}")
            unet = trained_unet(base, AdapterSpec())
            export(unet, Path("runs/quickstart/adapters"), base, stage, AdapterSpec())
        folders = ("models/if-tiny/stage_1", "models/if-tiny/stage_2")
        yield load_cascade(*folders, device="cpu")


def test_the_public_api_has_examples() -> None:
    assert {name.rpartition(".")[2] for name in FOUND} >= {
        *("load_cascade", "__call__", "add_adapter", "CascadeImages"),
        *("attach", "export_adapter", "read_info"),
        *("img2img", "read_picture_info", "save_embeds"),
    }


@pytest.mark.parametrize("name", FOUND)
def test_an_example_prints_what_it_says(cascade: Cascade, name: str) -> None:
    known = {public: getattr(adapters, public) for public in adapters.__all__}
    known |= {"cascade": cascade, "torch": torch, "UNet2DConditionModel": UNet2DConditionModel}
    module = import_module(FOUND[name])
    (example,) = (
        test for test in doctest.DocTestFinder().find(module, globs=known) if test.name == name
    )
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append)
    assert result.attempted == len(example.examples)
    assert not result.failed, "".join(said)
