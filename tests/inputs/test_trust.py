"""No code of others is run, nothing is unpickled at will, and no path leaves its folder."""

import ast
import json
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import UserError, load_cascade, load_embeds
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.kinds import AdapterSpec
from tests.builders import ROOT
from tests.builders.adapters import export, trained_unet
from tests.builders.random_cascade import RandomCascade

PACKAGES = ("adapters", "finetune", "unets", "models", "benchmarks")

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load_all"),
    *("pickle.load", "pickle.loads", "dill.load", "joblib.load", "marshal.loads", "shelve.open"),
    *("yaml.unsafe_load", "yaml.full_load", "runpy.run_path", "runpy.run_module"),
}
"""Functions that may run what they are given."""

ALLOWED = {
    "torch.load": "weights_only",  # True, as the test below requires
    "np.load": "allow_pickle",
    "numpy.load": "allow_pickle",
    "yaml.load": "Loader",
}
"""Functions that run nothing if a parameter says so."""

SAFE = {"True", "False", "Loader", "yaml.SafeLoader", "yaml12.Loader", "loader"}
"""The values of these parameters."""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """The calls in a module, by the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("package", PACKAGES)
def test_the_code_calls_nothing_that_runs_what_it_reads(package: str) -> None:
    found = []
    for file in (ROOT / package).rglob("*.py"):
        for name, call in calls(ast.parse(file.read_text(encoding="utf-8"))):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            unsafe = name in FORBIDDEN or given.get("trust_remote_code") not in (None, "False")
            unsafe |= given.get("shell") == "True"
            if name in ALLOWED:
                expected = {"weights_only": {"True"}, "allow_pickle": {"False"}}
                value = given.get(ALLOWED[name])
                needed = expected.get(ALLOWED[name], SAFE)
                unsafe |= value not in needed and not (name.endswith("np.load") and value is None)
            if unsafe:
                found.append(f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert found == []


class Trap:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def write_pickled(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(mark)))


@pytest.fixture
def export_folder(random_cascade: RandomCascade, tmp_path: Path) -> Path:
    base, spec = random_cascade.stage_1, AdapterSpec(rank=2)
    return export(trained_unet(base, spec), tmp_path / "dog", base, 1, spec).folder


def test_the_trap_works(tmp_path: Path) -> None:
    write_pickled(tmp_path / "a.bin", tmp_path / "sprung")
    pickle.loads((tmp_path / "a.bin").read_bytes())
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("adapter_model.bin", "pytorch_lora_weights.bin", "last.ckpt", "last.pt", "last.pth"),
        *("adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
    ],
)
def test_a_pickled_adapter_is_not_run(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "trap"
    folder.mkdir()
    write_pickled(folder / name, tmp_path / "sprung")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    for path in (folder, folder / name):
        with pytest.raises(UserError):
            StageAdapter.load_all(path)
    assert not (tmp_path / "sprung").exists()


def test_what_lies_beside_an_adapter_is_not_run(export_folder: Path, tmp_path: Path) -> None:
    write_pickled(export_folder / "adapter_model.bin", tmp_path / "sprung")
    write_pickled(export_folder / "training_args.bin", tmp_path / "sprung")
    (export_folder / "__init__.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    assert StageAdapter.load(export_folder).kind == "lora"
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["megatron_core", "auto_mapping", "task_type", "peft_type"])
def test_a_module_that_a_configuration_names_is_not_imported(
    name: str, export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap_module.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    file = export_folder / "adapter_config.json"
    value = {"auto_mapping": {"base_model_class": "x", "parent_library": "trap_module"}}
    settings = {"megatron_config": {"a": 1}} if name == "megatron_core" else {}
    settings |= {name: value.get(name, "trap_module")}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with suppress(UserError):
        StageAdapter.load(export_folder)
    assert not (tmp_path / "sprung").exists()
    assert "trap_module" not in sys.modules


def test_a_bases_code_is_not_run(random_cascade: RandomCascade, tmp_path: Path) -> None:
    base = Path(shutil.copytree(random_cascade.stage_1, tmp_path / "base"))
    code = f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass IFPipeline: pass\n"
    for place in ("pipeline.py", "unet/my_unet.py", "my_unet.py", "unet/modeling.py"):
        (base / place).write_text(code)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"unet": ["my_unet", "IFPipeline"]}))
    config = json.loads((base / "text_encoder/config.json").read_text())
    remote = {"auto_map": {"AutoModel": "modeling.IFPipeline"}}
    (base / "text_encoder/config.json").write_text(json.dumps(config | remote))
    with suppress(UserError):
        load_cascade(base, device="cpu")
    assert not (tmp_path / "sprung").exists()


def test_encodings_are_not_unpickled(tmp_path: Path) -> None:
    write_pickled(tmp_path / "a.safetensors", tmp_path / "sprung")
    with pytest.raises(UserError, match="cannot be read as text encodings"):
        load_embeds(tmp_path / "a.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_the_terminal_is_not_commanded(
    export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapters.inspect import main

    file = export_folder / "adapter_model.safetensors"
    found = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        own = json.loads(opened.metadata()["if_adapter"])
    own |= {"prompts": ["a \x1b]0;owned\x07 cat"], "recipe": "name: \x1b[2J\n"}
    save_file(found, file, metadata={"if_adapter": json.dumps(own)})
    main([str(export_folder), "--recipe"])
    told = capsys.readouterr().out
    assert r"\x1b]0;owned\x07" in told
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", told)
    with pytest.raises(SystemExit):
        main([f"{tmp_path}/\x1b[31m"])
    assert "\x1b" not in capsys.readouterr().err


def test_the_promises_name_what_there_is() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for said in ("weights_only=True", "@COMMIT", "make audit", "SHA256SUMS", "trust_remote_code"):
        assert said in text
    assert "audit" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert torch.load.__kwdefaults__["weights_only"] is None  # so that it must be said
