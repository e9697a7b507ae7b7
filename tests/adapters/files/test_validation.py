"""What is missing, damaged or of another kind in an adapter is said in one sentence, on reading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import Cascade, Parts, load_cascade
from adapters.combine import main as combine
from adapters.diff import main as diff
from adapters.errors import UserError
from adapters.files.places import PEFT_WEIGHTS
from adapters.files.reading import read_adapter
from adapters.files.stage_adapter import StageAdapter
from adapters.inspect import main as inspect
from adapters.merge import main as merge
from adapters.repair import main as repair
from adapters.repair import repair as repaired
from adapters.resize import main as resize
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.other_tools import ATTENTION, NAME, kohya, peft_folder, simpletuner
from tests.builders.random_cascade import RandomCascade

SPECS = {
    "lora": ATTENTION,
    "alpha": AdapterSpec(rank=2, alpha=3.0),
    "rslora": AdapterSpec(kind="rslora", rank=2, alpha=3.0),
    "dora": AdapterSpec(kind="dora", rank=2),
    "loha": AdapterSpec(kind="loha", rank=2),
    "lokr": AdapterSpec(kind="lokr", rank=2),
    "oft": AdapterSpec(kind="oft", rank=2),
}
CONFIG = "adapter_config.json"
FIRST = "down_blocks.1.attentions.0.to_q"


@pytest.fixture(scope="module")
def exports(
    random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An exported adapter of each of :data:`SPECS`."""
    base = random_cascade.stage_1
    return {
        name: export(trained_unet(base, spec), tmp_path_factory.mktemp(name), base, 1, spec).folder
        for name, spec in SPECS.items()
    }


def changed(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file; its header stays."""
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=header)


def without(part: str) -> Callable[[dict[str, Tensor]], None]:
    """A change that drops the tensors whose key has a part."""

    def drop(tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if part in name]
        assert names
        for name in names:
            del tensors[name]

    return drop


def refused(path: Path) -> str:
    """The one sentence with which an adapter is refused on reading."""
    with pytest.raises(UserError) as caught:
        StageAdapter.load_all(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("lokr", "lokr_w2")],
)
@pytest.mark.parametrize("signed", [True, False])
def test_a_missing_tensor_is_not_made_up(
    random_cascade: RandomCascade,
    exports: dict[str, Path],
    tmp_path: Path,
    kind: str,
    tensor: str,
    signed: bool,
) -> None:
    folder = Path(shutil.copytree(exports[kind], tmp_path / "stage_1"))
    changed(folder / PEFT_WEIGHTS, without(f"{FIRST}.{tensor}"))
    if not signed:
        save_file(load_file(folder / PEFT_WEIGHTS), folder / PEFT_WEIGHTS)
    cascade = load_cascade(random_cascade.stage_1)
    with pytest.raises(UserError, match=f"{FIRST}.{tensor}"):
        cascade.add_adapter(folder)
    assert not cascade.adapters


@pytest.mark.parametrize("kind", SPECS)
def test_missing_modules_of_an_export_are_listed(
    exports: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(exports[kind], tmp_path / "stage_1"))
    for file in folder.glob("*.safetensors"):
        changed(file, without("mid_block"))
        sentence = refused(file)
        assert "modules that its configuration names" in sentence
        assert "mid_block.attentions.0.to_q" in sentence
    with pytest.raises(UserError, match="no tensors for"):
        repaired(folder / NAME, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_missing_modules_of_a_peft_folder_are_listed_where_they_are_named_in_full(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    folder = peft_folder(trained_unet(random_cascade.stage_1, ATTENTION), tmp_path)
    config, state, _ = read_adapter(folder)
    targets = list(config.target_modules)
    changed(folder / PEFT_WEIGHTS, without("mid_block"))
    assert len(read_adapter(folder)[1]) < len(state)  # its targets are endings
    for named, settings in (
        ([*targets, "ff.net.0.proj"], {"exclude_modules": r"mid_block\..*"}),
        (r".*\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)", {}),
    ):
        LoraConfig(r=4, target_modules=named, **settings).save_pretrained(folder)
        read_adapter(folder)
    LoraConfig(r=4, target_modules=targets).save_pretrained(folder)
    assert "mid_block.attentions.0.to_q" in refused(folder)


def test_missing_magnitudes_are_listed(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports["dora"], tmp_path / "stage_1"))
    changed(folder / PEFT_WEIGHTS, without(f"{FIRST}.lora_magnitude_vector"))
    assert f"no lora_magnitude_vector for 1 modules ({FIRST})" in refused(folder)
    changed(folder / NAME, without("lora_magnitude_vector"))
    assert "no lora_magnitude_vector" in refused(folder / NAME)


E8 = torch.float8_e4m3fn
VALUES = [
    (lambda t: t.index_fill(0, torch.tensor([0]), float("nan")), "NaN or infinite"),
    (lambda t: t.index_fill(0, torch.tensor([0]), float("-inf")), "NaN or infinite"),
    (lambda t: t.double() + 1e300, "NaN or infinite"),
    (lambda t: t.to(torch.int8), "type int8"),
    (lambda t: t.to(E8), "type float8_e4m3fn .* convert it to fp16, bf16 or fp32"),
]


@pytest.mark.parametrize(("spoil", "sentence"), VALUES)
@pytest.mark.parametrize("kind", ["lora", "loha", "oft"])
def test_values_that_cannot_be_computed_with_are_refused(
    exports: dict[str, Path],
    tmp_path: Path,
    kind: str,
    spoil: Callable[[Tensor], Tensor],
    sentence: str,
) -> None:
    folder = Path(shutil.copytree(exports[kind], tmp_path / "stage_1"))
    key = next(iter(load_file(folder / PEFT_WEIGHTS)))
    changed(folder / PEFT_WEIGHTS, lambda tensors: tensors.update({key: spoil(tensors[key])}))
    with pytest.raises(UserError, match=sentence) as caught:
        read_adapter(folder)
    assert key in str(caught.value)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), [1.0, 2.0], []])
def test_an_alpha_is_one_finite_number(
    random_cascade: RandomCascade, tmp_path: Path, alpha: float | list[float]
) -> None:
    file = kohya(trained_unet(random_cascade.stage_1, ATTENTION), tmp_path)
    key = next(key for key in load_file(file) if key.endswith(".alpha"))
    changed(file, lambda tensors: tensors.update({key: torch.tensor(2)}))
    read_adapter(file)
    changed(file, lambda tensors: tensors.update({key: torch.tensor(alpha)}))
    assert key in refused(file)


@pytest.mark.parametrize("kind", SPECS)
def test_a_signed_adapter_needs_no_configuration_beside_it(
    exports: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    def settings(file: Path) -> dict[str, object]:
        config = read_adapter(file)[0].to_dict()
        stated = ("base_model_name_or_path", "revision", "inference_mode")
        return {name: value for name, value in config.items() if name not in stated}

    file = Path(shutil.copyfile(exports[kind] / PEFT_WEIGHTS, tmp_path / PEFT_WEIGHTS))
    assert settings(file) == settings(exports[kind] / PEFT_WEIGHTS)
    assert not caplog.records
    if kind == "alpha":
        save_file(load_file(file), file)
        assert settings(file)["lora_alpha"] == 2
        assert "no adapter_config.json next to it: alpha is taken" in caplog.text


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_other_kinds_need_their_own_configuration(
    exports: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(exports[kind], tmp_path / "stage_1"))
    (folder / CONFIG).unlink()
    save_file(load_file(folder / PEFT_WEIGHTS), folder / PEFT_WEIGHTS)  # without its header
    assert "no adapter_config.json next to it" in refused(folder)
    shutil.copyfile(exports["lora"] / CONFIG, folder / CONFIG)
    assert "configuration of LORA, but tensors of another kind" in refused(folder)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "peft_type should be one of LORA, LOHA, LOKR, OFT, not None"),
        ({"peft_type": "NOPE"}, "not 'NOPE'"),
        ({"peft_type": "IA3", "target_modules": ["to_q"]}, "not 'IA3'"),
        ({"peft_type": ["LORA"]}, r"not \['LORA'\]"),
        ([1], "a JSON object .got a list"),
        (None, "a JSON object .got a NoneType"),
        ({"peft_type": "LORA", "r": 0}, "its r is 0"),
        ({"peft_type": "LORA", "rank_pattern": {"to_q": 0}}, "its rank_pattern is 0 for to_q"),
        ({"peft_type": "LORA", "lora_alpha": None}, "its lora_alpha is None"),
        ({"peft_type": "LORA", "alpha_pattern": [1]}, r"its alpha_pattern is \[1\]"),
        ({"peft_type": "LOHA", "alpha": float("nan")}, "JSON has no NaN"),
        ({"peft_type": "LOHA", "target_modules": [1]}, "its target_modules are {1}"),
        ({"peft_type": "LOHA", "target_modules": 1}, "its target_modules are 1"),
        (
            {"peft_type": "LORA", "target_modules": "(to_q"},
            r"its target_modules has '\(to_q'.*not a reg",
        ),
        ({"peft_type": "LOKR", "exclude_modules": "*"}, r"its exclude_modules has '\*'.*repeat"),
        (
            {"peft_type": "LORA", "rank_pattern": {"[": 1}},
            r"its rank_pattern has '\['.*not a regular",
        ),
        ({"peft_type": "LOHA", "alpha_pattern": {"a{9" + "9" * 30 + "}": 1}}, "alpha_pattern has"),
        ({"peft_type": "LORA", "r": 10**30}, f"its r is {10**30}"),
    ],
)
def test_a_configuration_of_nothing_we_know_is_refused(
    exports: dict[str, Path], tmp_path: Path, settings: object, sentence: str
) -> None:
    folder = Path(shutil.copytree(exports["lora"], tmp_path / "stage_1"))
    (folder / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"{CONFIG} is not a PEFT configuration .*{sentence}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "\0", ""]
)
def test_json_that_cannot_be_parsed_is_said(
    exports: dict[str, Path], tmp_path: Path, text: str
) -> None:
    folder = Path(shutil.copytree(exports["lora"], tmp_path / "stage_1"))
    (folder / CONFIG).write_text(text)
    assert f"{CONFIG} is not a PEFT configuration" in refused(folder)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_rank_that_is_not_that_of_the_tensors_is_refused(
    exports: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(exports[kind], tmp_path / "stage_1"))
    own = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(own | {"r": 10**9}))
    assert "tensors of rank 2 for" in refused(folder)
    assert "states 1000000000" in refused(folder)


@pytest.mark.parametrize(
    "metadata",
    [
        "[1]",
        '"a"',
        "null",
        '{"unet.lora_alpha": "x"}',
        '{"unet.r": 0}',
        '{"unet.alpha_pattern": 1}',
    ],
)
def test_a_header_of_nothing_we_know_is_refused(
    random_cascade: RandomCascade, tmp_path: Path, metadata: str
) -> None:
    file = simpletuner(trained_unet(random_cascade.stage_1, ATTENTION), tmp_path)
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": metadata})
    assert "lora_adapter_metadata of" in refused(file)


def test_tensors_of_rank_0_or_without_two_dimensions_are_refused(tmp_path: Path) -> None:
    pairs = ((torch.zeros(0, 8), torch.zeros(8, 0)), (torch.zeros(()), torch.zeros(8, 1)))
    for (a, b), sentence in zip(pairs, ("of rank 0", "ranks or dimensions differ"), strict=True):
        names = {f"unet.{FIRST}.lora_{side}.weight": t for side, t in (("A", a), ("B", b))}
        save_file(names, tmp_path / NAME)
        assert sentence in refused(tmp_path / NAME)


@pytest.fixture(scope="module")
def cascade(random_cascade: RandomCascade) -> Cascade:
    return load_cascade(random_cascade.stage_1, parts=Parts(text_encoder=False))


@pytest.mark.parametrize("scale", [1e300, -1001, float("inf"), float("nan"), 10**400])
def test_a_scale_is_a_number_within_bounds(
    exports: dict[str, Path], cascade: Cascade, scale: float
) -> None:
    with pytest.raises(UserError, match="from -1000 to 1000"):
        cascade.add_adapter(exports["lora"], scale)
    assert not cascade.adapters
    name = cascade.add_adapter(exports["lora"])
    with pytest.raises(UserError, match="from -1000 to 1000"):
        cascade.set_adapters({name: scale})
    cascade.remove_adapters()


def test_the_tools_refuse_in_one_sentence(
    random_cascade: RandomCascade,
    exports: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(exports["lora"], tmp_path / "stage_1"))
    changed(folder / PEFT_WEIGHTS, lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
    bad, good, out = str(folder), str(exports["lora"]), ["--out", str(tmp_path / "new")]
    base = ["--base", str(random_cascade.stage_1)]
    for tool, arguments, sentence in (
        (inspect, [bad], "NaN or infinite"),
        (resize, [bad, "--rank", "1", *out], "NaN or infinite"),
        (diff, [bad, good], "NaN or infinite"),
        (repair, [bad, "--out", f"{out[1]}.safetensors"], "NaN or infinite"),
        (combine, [bad, good, *out], "NaN or infinite"),
        (merge, [bad, *base, *out], "NaN or infinite"),
        (merge, [good, *base, *out, "--scale", "1e300"], "from -1000 to 1000"),
        (combine, [f"{good}=1e300", *out], "from -1000 to 1000"),
    ):
        with pytest.raises(SystemExit) as caught:
            tool(arguments)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert sentence in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["stage_1"]


def test_a_file_that_diffusers_takes_in_no_spelling_is_not_called_whole(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.files.for_diffusers.list_arriving", lambda *of: [])
    with pytest.raises(UserError, match="diffusers loads only 0 of its"):
        repaired(exports["lora"], tmp_path / "new.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lora", {"bias": 3}),
        ("lora", {"exclude_modules": 3}),
        ("lora", {"megatron_config": {"a": 1}}),
        ("lora", {"alora_invocation_tokens": [1]}),
        ("oft", {"oft_block_size": "x"}),
    ],
)
def test_settings_that_peft_cannot_follow_are_said(
    exports: dict[str, Path],
    cascade: Cascade,
    tmp_path: Path,
    kind: str,
    settings: dict[str, object],
    signed: bool,
) -> None:
    folder = Path(shutil.copytree(exports[kind], tmp_path / "stage_1"))
    if not signed:
        save_file(load_file(folder / PEFT_WEIGHTS), folder / PEFT_WEIGHTS)
    own = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(own | settings))
    with pytest.raises(UserError) as caught:
        cascade.add_adapter(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not cascade.adapters
