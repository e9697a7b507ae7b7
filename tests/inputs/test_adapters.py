"""Adapters of others: damaged, incomplete, of another kind, or made to do harm."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.errors import UserError
from adapters.files.stage_adapter import StageAdapter
from adapters.inspect import main as inspect
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.inputs import Refused, check_refused
from tests.builders.other_tools import WRITERS, peft_folder
from tests.builders.other_tools import name_of as name_of_writer
from tests.builders.random_cascade import RandomCascade

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = "down_blocks.1.attentions.0.to_q"
KEY = f"base_model.model.{FIRST}.lora_A.weight"
AGAIN = "fetch or export it again"
NO_CONFIG = "is not a PEFT configuration of a UNet's adapter"

Spoil = Callable[[Path], object]
"""A change to the folder of one exported stage."""

SPECS = {
    "lora": AdapterSpec(rank=2, alpha=3.0),
    "dora": AdapterSpec(kind="dora", rank=2),
    "loha": AdapterSpec(kind="loha", rank=2),
    "oft": AdapterSpec(kind="oft", rank=2),
}


@pytest.fixture(scope="module")
def exports(
    random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An exported stage of each of :data:`SPECS`."""
    base = random_cascade.stage_1
    return {
        name: export(trained_unet(base, spec), tmp_path_factory.mktemp(name), base, 1, spec).folder
        for name, spec in SPECS.items()
    }


def writing(content: bytes | str, name: str = WEIGHTS) -> Spoil:
    """A change that overwrites a file."""
    encoded = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(encoded)


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def tensor_file(header: object) -> bytes:
    """A safetensors file with a header of one's own, and 64 bytes of values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """A change to the tensors of the weights; their header stays."""

    def spoil(folder: Path) -> None:
        with safe_open(folder / WEIGHTS, "pt") as opened:
            header = opened.metadata()
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata=header)

    return spoil


def set_tensor(key: str, value: Tensor) -> Spoil:
    return tensors(lambda found: found.update({key: value}))


def drop(part: str) -> Spoil:
    """A change that drops the tensors whose key has a part."""

    def change(found: dict[str, Tensor]) -> None:
        for key in [key for key in found if part in key]:
            del found[key]

    return tensors(change)


def config(**settings: object) -> Spoil:
    """A change to the configuration beside the weights."""

    def spoil(folder: Path) -> None:
        own = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(own | settings))

    return spoil


def header(**entries: str) -> Spoil:
    """A change that leaves only the weights, with these entries in their header."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        shutil.rmtree(folder)
        folder.mkdir()
        save_file(found, folder / WEIGHTS, metadata=entries)

    return spoil


def info(**changes: Any) -> Spoil:
    """A change to what an export says of itself."""

    def spoil(folder: Path) -> None:
        with safe_open(folder / WEIGHTS, "pt") as opened:
            own = json.loads(opened.metadata()["if_adapter"])
        header(if_adapter=json.dumps(own | changes))(folder)

    return spoil


def replacing(name: str, make: Callable[[Path], object]) -> Spoil:
    """A change that puts something else in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def emptied(*files: str) -> Spoil:
    """A change that leaves only files, without content."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for file in files:
            (folder / file).touch()

    return spoil


SLOW = r"(.|..)+(?<=!)"
"""A pattern that takes exponential time."""

Row = tuple[str, str, Spoil, Sequence[str]]
"""A case's name, the export that is spoiled, the change, and what the sentence holds."""

FILES: list[Row] = [
    ("no bytes", "lora", writing(b""), [WEIGHTS, "cannot be read", AGAIN]),
    ("half of a file", "lora", cut, [WEIGHTS, "cannot be read", AGAIN]),
    ("a zip", "lora", writing(b"PK\3\4" * 99), [WEIGHTS, "cannot be read", AGAIN]),
    ("a text", "lora", writing("version https://git-lfs"), [WEIGHTS, "cannot be read", AGAIN]),
    (
        "a header larger than the file",
        "lora",
        writing((2**40).to_bytes(8, "little") + b"{}"),
        [WEIGHTS, "cannot be read", AGAIN],
    ),
    (
        "a header larger than 2^63",
        "lora",
        writing(b"\xff" * 16),
        [WEIGHTS, "cannot be read", AGAIN],
    ),
    ("a header of 0 bytes", "lora", writing(bytes(16)), [WEIGHTS, "cannot be read", AGAIN]),
    (
        "a header nested without end",
        "lora",
        writing(tensor_file(b'{"a":' * 10**5)),
        [WEIGHTS, "cannot be read", AGAIN],
    ),
    ("a header that is no JSON", "lora", writing(tensor_file(b"[")), [WEIGHTS, AGAIN]),
    ("a header that is not UTF-8", "lora", writing(tensor_file(b'{"\xff": 1}')), [WEIGHTS, AGAIN]),
    ("a header that is a list", "lora", writing(tensor_file([1])), [WEIGHTS, AGAIN]),
    (
        "values beyond the file",
        "lora",
        writing(tensor_file({KEY: {"dtype": "F32", "shape": [4, 9], "data_offsets": [0, 144]}})),
        [WEIGHTS, "cannot be read", AGAIN],
    ),
    (
        "a shape of another size than its values",
        "lora",
        writing(tensor_file({KEY: {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 64]}})),
        [WEIGHTS, "cannot be read", AGAIN],
    ),
    (
        "a size that overflows",
        "lora",
        writing(tensor_file({KEY: {"dtype": "F32", "shape": [2**62, 9], "data_offsets": [0, 64]}})),
        [WEIGHTS, "cannot be read", AGAIN],
    ),
    (
        "an unknown type of values",
        "lora",
        writing(tensor_file({KEY: {"dtype": "X9", "shape": [16], "data_offsets": [0, 64]}})),
        [WEIGHTS, "cannot be read", AGAIN],
    ),
    (
        "metadata that is no text",
        "lora",
        writing(tensor_file({"__metadata__": {"if_adapter": {"a": 1}}})),
        [WEIGHTS, "cannot be read", AGAIN],
    ),
    ("no tensors", "lora", tensors(dict.clear), [WEIGHTS, "but it is empty"]),
    (
        "a pipe",
        "lora",
        lambda folder: [emptied()(folder), os.mkfifo(folder / WEIGHTS)],
        ["has no exported adapter"],
    ),
    (
        "a soft link to nothing",
        "lora",
        lambda folder: [emptied()(folder), (folder / WEIGHTS).symlink_to("nothing")],
        ["stage_1", "has no exported adapter", "name the folder of a finished run"],
    ),
    ("an empty folder", "lora", emptied(), ["stage_1", "has no exported adapter"]),
    (
        "two files of unknown names",
        "lora",
        emptied("a.safetensors", "b.safetensors"),
        ["has 2 .safetensors files (a.safetensors, b.safetensors)", "name the one that you mean"],
    ),
    ("a pickled adapter", "lora", emptied("adapter_model.bin"), ["may run code", "convert"]),
    ("a pickled file", "lora", emptied("last.ckpt"), ["last.ckpt cannot be read", "may run code"]),
]

NAN, INF = float("nan"), float("inf")

TENSORS: list[Row] = [
    ("NaN", "lora", set_tensor(KEY, torch.full((2, 64), NAN)), ["NaN or infinite", KEY]),
    ("infinity", "lora", set_tensor(KEY, torch.full((2, 64), -INF)), ["NaN or infinite", KEY]),
    (
        "numbers beyond float32",
        "lora",
        set_tensor(KEY, torch.full((2, 64), 1e300, dtype=torch.float64)),
        ["NaN or infinite", KEY],
    ),
    (
        "whole numbers",
        "lora",
        set_tensor(KEY, torch.ones(2, 64, dtype=torch.int8)),
        ["type int8", KEY, "convert it to fp16, bf16 or fp32"],
    ),
    (
        "complex numbers",
        "lora",
        set_tensor(KEY, torch.ones(2, 64, dtype=torch.complex64)),
        ["type complex64", KEY],
    ),
    ("another rank", "lora", set_tensor(KEY, torch.ones(3, 64)), [FIRST, "ranks or dimensions"]),
    ("one dimension", "lora", set_tensor(KEY, torch.ones(2)), [FIRST, "ranks or dimensions"]),
    ("no dimension", "lora", set_tensor(KEY, torch.ones(())), [FIRST, "ranks or dimensions"]),
    ("a rank of 0", "lora", set_tensor(KEY, torch.ones(0, 64)), ["of rank 0", KEY]),
    ("half of a module", "lora", drop(f"{FIRST}.lora_B"), ["incomplete", f"{FIRST}.lora_B"]),
    ("a module less", "lora", drop(FIRST), ["no tensors for 1 of the modules", FIRST, AGAIN]),
    ("no magnitude", "dora", drop(f"{FIRST}.lora_mag"), ["is a DoRA", FIRST, AGAIN]),
    ("half of a LoHa", "loha", drop(f"{FIRST}.hada_w1_a"), ["incomplete", f"{FIRST}.hada_w1_a"]),
    (
        "an unknown module",
        "lora",
        set_tensor("unet.lower_blocks.0.to_q.lora_A.weight", torch.ones(2, 2)),
        ["unet.lower_blocks.0.to_q.lora_A.weight", "belong to no module"],
    ),
    (
        "a name of 100,000 letters",
        "lora",
        set_tensor("x" * 100_000, torch.ones(2, 2)),
        ["xxx", "letters) …", "belong to no known kind"],
    ),
    (
        "control characters in a name",
        "lora",
        set_tensor("\x1b[31mred", torch.ones(2, 2)),
        ["\\x1b[31mred", "belong to no known kind"],
    ),
    (
        "a text encoder",
        "lora",
        set_tensor("lora_te1_text_model.lora_down.weight", torch.ones(2, 2)),
        ["adapt a text encoder", "save the UNet's adapter alone"],
    ),
    (
        "Stable Diffusion's names",
        "lora",
        set_tensor("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", torch.ones(2, 2)),
        ["names of the original Stable Diffusion"],
    ),
    (
        "a whole model",
        "lora",
        set_tensor("mid_block.attentions.0.to_q.weight", torch.ones(2, 2)),
        ["weights of a model itself", "adapters.extract"],
    ),
    (
        "two spellings",
        "lora",
        set_tensor(f"unet.{FIRST}.lora.down.weight", torch.ones(2, 64)),
        ["two spellings, or two adapters, of one tensor"],
    ),
    (
        "an alpha of two numbers",
        "lora",
        set_tensor(f"base_model.model.{FIRST}.alpha", torch.ones(2)),
        ["should be one number each", f"{FIRST}.alpha"],
    ),
    (
        "a complex alpha",
        "lora",
        set_tensor(f"base_model.model.{FIRST}.alpha", torch.ones((), dtype=torch.complex64)),
        ["type complex64", f"{FIRST}.alpha"],
    ),
    (
        "an alpha that is NaN",
        "lora",
        set_tensor(f"base_model.model.{FIRST}.alpha", torch.tensor(NAN)),
        ["NaN or infinite", f"{FIRST}.alpha"],
    ),
    (
        "an alpha alone",
        "lora",
        set_tensor("base_model.model.conv_in.alpha", torch.tensor(1.0)),
        ["incomplete", "all but conv_in.alpha"],
    ),
]

CONFIGS: list[Row] = [
    ("no bytes", "lora", writing("", CONFIG), [CONFIG, NO_CONFIG, "JSON object"]),
    ("no JSON", "lora", writing("{", CONFIG), [CONFIG, NO_CONFIG, "line 1, column 2"]),
    ("a list", "lora", writing("[1]", CONFIG), [CONFIG, "JSON object (got a list)"]),
    ("nothing in it", "lora", writing("{}", CONFIG), [CONFIG, "one of LORA, LOHA, LOKR, OFT"]),
    ("nested without end", "lora", writing("[" * 10**6, CONFIG), [CONFIG, "nested too deeply"]),
    ("NUL", "lora", writing("\0", CONFIG), [CONFIG, NO_CONFIG]),
    ("UTF-16", "lora", writing("{}".encode("utf-16"), CONFIG), [CONFIG, "UTF-16"]),
    ("another encoding", "lora", writing(b'{"\xe9": 1}', CONFIG), [CONFIG, "is not UTF-8"]),
    ("17 megabytes", "lora", writing(b" " * 2**24 + b"{}", CONFIG), [CONFIG, "more than 16"]),
    ("a pipe", "lora", replacing(CONFIG, os.mkfifo), [CONFIG, "a pipe or device"]),
    ("a folder", "lora", replacing(CONFIG, Path.mkdir), [CONFIG, "a folder, not a file"]),
    ("a number of 5,000 digits", "lora", writing(f'{{"r": {"9" * 5000}}}', CONFIG), [CONFIG]),
    ("NaN", "lora", config(lora_alpha=NAN), [CONFIG, "JSON has no NaN"]),
    ("an unknown kind", "lora", config(peft_type="X"), ["LORA, LOHA, LOKR, OFT, not 'X'"]),
    ("a kind for other models", "lora", config(peft_type="IA3"), ["not 'IA3'"]),
    ("a kind that is a list", "lora", config(peft_type=["LORA"]), ["not ['LORA']"]),
    ("a rank of 0", "lora", config(r=0), ["its r is 0", "correct it"]),
    ("a rank of 10^30", "lora", config(r=10**30), [f"its r is {10**30}"]),
    ("a rank that is a text", "lora", config(r="4"), ["its r is '4'"]),
    ("an alpha of 1e300", "lora", config(lora_alpha=1e300), ["its lora_alpha is 1e+300"]),
    ("no alpha", "lora", config(lora_alpha=None), ["its lora_alpha is None"]),
    ("ranks that are a list", "lora", config(rank_pattern=[1]), ["its rank_pattern is [1]"]),
    ("a broken pattern", "lora", config(rank_pattern={"(": 1}), ["rank_pattern has '('"]),
    ("a pattern of a million letters", "lora", config(alpha_pattern={"a" * 10**6: 1}), ["letters"]),
    ("a broken exclusion", "lora", config(exclude_modules="*"), ["exclude_modules has '*'"]),
    ("an endless pattern", "lora", config(rank_pattern={SLOW: 1}), ["3 seconds", "in full"]),
    ("an endless exclusion", "lora", config(exclude_modules=SLOW), ["3 seconds", "in full"]),
    (
        "a pattern of layers",
        "lora",
        config(layers_to_transform=[1], layers_pattern="(a+)+"),
        ["its layers_pattern has '(a+)+', which is no name"],
    ),
    ("targets that are numbers", "lora", config(target_modules=[1]), ["its target_modules are"]),
    ("exclusions that are numbers", "lora", config(exclude_modules=3), ["its exclude_modules are"]),
    ("modules saved whole", "lora", config(modules_to_save=["conv_in"]), ["its modules_to_save"]),
    (
        "a module to import",
        "lora",
        config(megatron_config={"a": 1}, megatron_core="antigravity"),
        ["its megatron_co", "cannot be merged"],
    ),
    (
        "a setting of the future",
        "lora",
        config(use_new=[1]),
        ["its use_new are no settings", "update PEFT"],
    ),
    (
        "a billion steps of an initialisation",
        "lora",
        config(init_lora_weights="pissa_niter_1000000000"),
        ["its init_lora_weights is 'pissa_niter_1000000000'", "100"],
    ),
    ("an initialisation of a number", "lora", config(init_lora_weights=3), ["init_lora_weights"]),
    (
        "a billion terms",
        "oft",
        config(num_cayley_neumann_terms=10**9),
        ["its num_cayley_neumann_terms is 1000000000, not 1 to 100"],
    ),
    ("a block size of a text", "oft", config(oft_block_size="x"), ["its oft_block_size is 'x'"]),
    ("a bias of a number", "lora", config(bias=3), ["its bias is 3"]),
    ("a rank unlike the tensors'", "loha", config(r=9), ["rank 2 for", "states 9", CONFIG]),
    (
        "the configuration of another kind",
        "loha",
        config(peft_type="LORA", lora_alpha=1),
        ["its alpha, init_weights are no settings of a LORA", CONFIG],
    ),
    (
        "none at all",
        "loha",
        header(),
        [f"no {CONFIG} next to it", "put the adapter_config.json that it was saved with"],
    ),
]

HEADERS: list[Row] = [
    ("an export's that is no JSON", "lora", header(if_adapter="{"), ["'if_adapter' entry"]),
    ("nested without end", "lora", header(if_adapter="[" * 10**5), ["'if_adapter' entry"]),
    ("a stage that there is not", "lora", info(stage=3), ["'if_adapter' entry", "export it again"]),
    (
        "a rank of 10^30",
        "lora",
        info(spec={"kind": "lora", "rank": 10**30, "alpha": 1.0}),
        ["'if_adapter' entry", "export it again"],
    ),
    ("an endless alpha", "lora", info(spec={"kind": "dora", "alpha": INF}), ["'if_adapter' entry"]),
    ("an unknown entry", "lora", info(run="rm -rf"), ["'if_adapter' entry"]),
    ("a list", "lora", header(lora_adapter_metadata="[1]"), ["lora_adapter_metadata", NO_CONFIG]),
    ("no JSON", "lora", header(lora_adapter_metadata="{"), ["lora_adapter_metadata", NO_CONFIG]),
    (
        "metadata nested without end",
        "lora",
        header(lora_adapter_metadata="[" * 10**5),
        ["lora_adapter_metadata", NO_CONFIG],
    ),
    ("a rank of 0", "lora", header(lora_adapter_metadata='{"unet.r": 0}'), ["its r is 0"]),
    (
        "a module to import",
        "lora",
        header(lora_adapter_metadata='{"unet.r": 2, "unet.megatron_config": {"a": 1}}'),
        ["lora_adapter_metadata", "its megatron_config is {'a': 1}, which cannot be merged"],
    ),
]

ROWS = {
    f"{table}: {name}": (kind, spoil, says)
    for table, rows in (
        ("file", FILES),
        ("tensors", TENSORS),
        ("configuration", CONFIGS),
        ("header", HEADERS),
    )
    for name, kind, spoil, says in rows
}


@pytest.mark.parametrize("name", ROWS)
def test_it_is_refused(
    name: str,
    exports: Mapping[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    kind, spoil, says = ROWS[name]

    def arrange(folder: Path) -> list[Path]:
        stage = Path(shutil.copytree(exports[kind], folder / "stage_1"))
        spoil(stage)
        return [stage]

    check_refused(Refused(name, arrange, says), inspect, tmp_path, capsys)
    assert [str(warning.message) for warning in recwarn] == []


PLACES = {
    "nothing there": ("nowhere", ["nowhere has no exported adapter (there is no such file"]),
    "a path that is no hub name": ("a/b/c/d", ["a/b/c/d has no exported adapter"]),
    "a name that is too long": ("x" * 5000, ["xxx", "File name too long", "correct the path"]),
    "a home of nobody": ("~nobody_here/dog", ["~nobody_here", "names no user's home folder"]),
    "a text file": ("notes.txt", ["notes.txt is not an adapter", ".safetensors"]),
    "a device": ("/dev/null", ["/dev/null has no exported adapter"]),
    "a run that has exported nothing": ("run", ["has exported no adapter yet", "train it"]),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_without_an_adapter_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, says = PLACES[name]

    def arrange(folder: Path) -> list[str]:
        monkeypatch.chdir(folder)
        Path("notes.txt").write_text("no adapter")
        Path("run").mkdir()
        Path("run/recipe.yaml").write_text("name: run\n")
        return [place]

    check_refused(Refused(name, arrange, says), inspect, tmp_path, capsys)


def read(folder: Path) -> StageAdapter:
    (adapter,) = StageAdapter.load_all(folder)
    return adapter


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
ACCEPTED: dict[str, tuple[Spoil, Callable[[StageAdapter], object], object]] = {
    "a rank by the end of a name": (
        config(rank_pattern={"to_q": 2}),
        lambda adapter: adapter.ranks[FIRST],
        2,
    ),
    "an alpha by a pattern": (
        config(alpha_pattern={r"down_blocks\.\d+\..*\.to_(q|k)": 8}),
        lambda adapter: (adapter.alphas[FIRST], adapter.alphas["mid_block.attentions.0.to_q"]),
        (8, 3.0),
    ),
    "the first pattern that matches": (
        config(alpha_pattern={"to_q": 8, FIRST: 9}),
        lambda adapter: adapter.alphas[FIRST],
        8,
    ),
    "a pattern for targets": (
        config(target_modules=rf".*\.({'|'.join(ATTENTION)})"),
        lambda adapter: len(adapter.modules) > 10,
        True,
    ),
    "an exclusion of modules that are not there": (
        config(exclude_modules=r".*\.resnets\..*"),
        lambda adapter: adapter.config.exclude_modules,
        None,
    ),
    "settings of the future that are off": (
        config(use_new=False, newer=None, newest=[]),
        lambda adapter: adapter.alphas[FIRST],
        3.0,
    ),
    "a configuration with a byte-order mark": (
        lambda folder: (folder / CONFIG).write_bytes(
            b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes()
        ),
        lambda adapter: adapter.alphas[FIRST],
        3.0,
    ),
    "no configuration, as the header has one": (
        lambda folder: (folder / CONFIG).unlink(),
        lambda adapter: adapter.alphas[FIRST],
        3.0,
    ),
    "an alpha that is a whole number": (
        set_tensor(f"base_model.model.{FIRST}.alpha", torch.tensor(5)),
        lambda adapter: adapter.alphas[FIRST],
        5.0,
    ),
    "half precision": (
        tensors(lambda found: found.update({k: t.half() for k, t in found.items()})),
        lambda adapter: adapter.state[f"{FIRST}.lora_A.weight"].dtype,
        torch.float16,
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_read_as_it_was_meant(
    name: str, exports: Mapping[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    change, look, expected = ACCEPTED[name]
    folder = Path(shutil.copytree(exports["lora"], tmp_path / "stage_1"))
    change(folder)
    assert look(read(folder)) == expected
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(("write", "spec"), WRITERS, ids=name_of_writer)
@pytest.mark.parametrize("name", ["dog", "a=b", "[a] ${HOME} ::ü", "x.safetensors"])
def test_files_of_other_tools_are_read_from_any_folder(
    random_cascade: RandomCascade, tmp_path: Path, write: Any, spec: AdapterSpec, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    unet = trained_unet(random_cascade.stage_1, spec)
    adapter = read(write(unet, folder))
    assert adapter.kind == "lora"
    assert set(adapter.ranks.values()) == {spec.rank}
    assert FIRST in adapter.modules


def test_patterns_mean_what_they_mean_to_peft(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    from peft.utils.other import get_pattern_key

    folder = peft_folder(trained_unet(random_cascade.stage_1, AdapterSpec(rank=4)), tmp_path)
    patterns = {"to_q": 2.0, r"mid_block\..*": 3.0, "blocks.1": 4.0, r"^up_.*to_k": 5.0, "to": 6.0}
    config(alpha_pattern=patterns)(folder)
    adapter = read(folder)
    expected = {n: patterns.get(get_pattern_key(patterns, n), 4) for n in adapter.modules}
    assert adapter.alphas == expected
    assert {2.0, 3.0, 5.0} < set(expected.values())


def test_a_signature_of_other_weights_is_another_base(
    random_cascade: RandomCascade, exports: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports["lora"], tmp_path / "stage_1"))
    own = read(folder).info
    assert own is not None
    assert own.base_signature is not None
    signature = own.base_signature.model_dump() | {"values": {"conv_nowhere": [1.0]}}
    info(base_signature=signature)(folder)
    with pytest.raises(UserError, match=r"not of .*the signature is of conv_nowhere, not of"):
        read(folder).check_base(own.base_signature, str(random_cascade.stage_1))
