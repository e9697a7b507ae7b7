"""Bases that end in one sentence before the work begins, and odd ones that are right."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from adapters.base.source import Source
from finetune.run.early_checks import check_base
from finetune.step.stages import STAGES
from finetune.train import main
from tests.builders.inputs import Refused, check_refused
from tests.builders.published_layouts import rewrite
from tests.builders.random_cascade import RandomCascade

CPU = torch.device("cpu")
Change = Callable[[Path], object]
"""Changes the folder of a base, with ``stage_1`` and ``stage_2`` in it."""

UNET = "stage_1/unet/config.json"
NET = "stage_1/unet/diffusion_pytorch_model.safetensors"
ENCODER = "stage_1/text_encoder/config.json"
SCHEDULER = "stage_1/scheduler/scheduler_config.json"
NOISING = "stage_2/image_noising_scheduler/scheduler_config.json"
INDEX = "stage_1/model_index.json"
TOKENIZER = "stage_1/tokenizer/tokenizer.json"

GONE = object()
"""Stands for a key that is left out."""


def keys(file: str, **changes: object) -> Change:
    """Change keys of a configuration file."""

    def change(base: Path) -> None:
        tree = json.loads((base / file).read_text()) | changes
        kept = {key: value for key, value in tree.items() if value is not GONE}
        (base / file).write_text(json.dumps(kept))

    return change


def content(file: str, data: str | bytes) -> Change:
    """Write a file."""
    return lambda base: (base / file).write_bytes(data.encode() if isinstance(data, str) else data)


def remove(place: str) -> Change:
    """Remove a file or folder."""

    def change(base: Path) -> None:
        path = base / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def replace(file: str, make: Callable[[Path], object]) -> Change:
    """Put something else in place of a file."""

    def change(base: Path) -> None:
        (base / file).unlink()
        make(base / file)

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object], file: str = NET) -> Change:
    """Change the tensors of a file of weights."""

    def rewritten(base: Path) -> None:
        tensors = load_file(base / file)
        change(tensors)
        save_file(tensors, base / file, {"format": "pt"})

    return rewritten


def value(file: str, key: str, found: object, *says: str) -> tuple[str, Change, Sequence[str]]:
    """A configuration file in which one key has a value."""
    place = file.partition("/")[2]
    shown = "gone" if found is GONE else json.dumps(found)[:40]
    return (
        f"{key}: {shown} in {place}",
        keys(file, **{key: found}),
        (f"{key} in its {place}", *says),
    )


LAYERS = "must be at most 256 or a list (got 1000000)"
Case = tuple[str, Change, Sequence[str]]
CONFIGURATIONS: Sequence[Case] = (
    value(UNET, "sample_size", 0, "must be at least 1 (got 0)"),
    value(UNET, "sample_size", -8, "must be at least 1 (got -8)"),
    value(UNET, "sample_size", 10**9, "must be at most 8,192"),
    value(UNET, "sample_size", "16", "must be a whole number (got '16')"),
    value(UNET, "sample_size", 16.5, "must be a whole number (got 16.5)"),
    value(UNET, "sample_size", None, "must be given"),
    value(UNET, "sample_size", GONE, "must be given"),
    ("sample_size: 33", keys(UNET, sample_size=33), ["sample_size must be a multiple of 2"]),
    value(UNET, "norm_num_groups", 0, "must be at least 1 (got 0)"),
    value(UNET, "norm_num_groups", None, "must be a whole number (got null)"),
    ("groups", keys(UNET, norm_num_groups=7), ["norm_num_groups must divide all of block_out"]),
    value(UNET, "layers_per_block", 0, "must be at least 1"),
    value(UNET, "layers_per_block", 10**6, LAYERS),
    value(UNET, "transformer_layers_per_block", 10**6, LAYERS),
    value(UNET, "block_out_channels", 3, "must be a list (got 3)"),
    value(UNET, "block_out_channels", [], "must have at least 1 item(s), not 0"),
    ("a width of 0", keys(UNET, block_out_channels=[0, 64]), ["block_out_channels.0 in its unet"]),
    ("a width of 10^9", keys(UNET, block_out_channels=[32, 10**9]), ["block_out_channels.1 in"]),
    value(UNET, "attention_head_dim", 0, "must be at least 1"),
    value(UNET, "cross_attention_dim", -1, "must be at least 1"),
    value(UNET, "in_channels", 4, "must be 3 in Stage 1 (got 4)"),
    value(UNET, "out_channels", 3, "must be 6 in Stage 1 (got 3)"),
    value(UNET, "encoder_hid_dim", None, "must be given"),
    ("another width", keys(UNET, encoder_hid_dim=48), ["encodings of width 48", "32 wide"]),
    value(UNET, "dropout", 2, "must be at most 1"),
    value(UNET, "norm_eps", -1, "must be above 0"),
    value(UNET, "conv_in_kernel", 0, "must be at least 1"),
    value(UNET, "addition_embed_type_num_heads", 0, "must be at least 1"),
    ("a block", keys(UNET, down_block_types=["Nope", "Nope"]), ["cannot be loaded", "Nope"]),
    ("blocks", keys(UNET, down_block_types=["ResnetDownsampleBlock2D"]), ["cannot be loaded"]),
    ("a function", keys(UNET, act_fn="nope"), ["cannot be loaded", "nope"]),
    value(SCHEDULER, "num_train_timesteps", 0, "must be at least 1"),
    value(SCHEDULER, "num_train_timesteps", -1, "must be at least 1"),
    value(SCHEDULER, "num_train_timesteps", 10**9, "must be at most 1,000,000"),
    value(SCHEDULER, "num_train_timesteps", "many", "must be a whole number (got 'many')"),
    value(SCHEDULER, "num_train_timesteps", GONE, "must be given"),
    value(SCHEDULER, "beta_schedule", GONE, "must be given"),
    value(SCHEDULER, "beta_schedule", 3, "must be a text (got 3)"),
    ("a schedule", keys(SCHEDULER, beta_schedule="nope"), ["cannot be loaded", "nope"]),
    value(SCHEDULER, "beta_end", 2, "must be below 1"),
    value(SCHEDULER, "prediction_type", "nope", "must be 'epsilon', 'sample' or", "(got 'nope')"),
    ("a v", keys(SCHEDULER, prediction_type="v_prediction"), ["'v_prediction'", "only epsilon"]),
    value(SCHEDULER, "variance_type", "nope", "must be 'fixed_small'", "(got 'nope')"),
    value(SCHEDULER, "timestep_spacing", "nope", "must be 'linspace'", "(got 'nope')"),
    value(SCHEDULER, "dynamic_thresholding_ratio", [1], "must be a number (got [1])"),
    value(SCHEDULER, "dynamic_thresholding_ratio", 2, "must be at most 1"),
    value(SCHEDULER, "clip_sample", "yes", "must be true or false (got 'yes')"),
    value(SCHEDULER, "trained_betas", "x", "must be a list (got 'x')"),
    ("an empty schedule", content(SCHEDULER, "{}"), ["num_train_timesteps in its scheduler/"]),
    value(NOISING, "num_train_timesteps", 0, "must be at least 1"),
    value(ENCODER, "d_model", 0, "must be at least 1"),
    value(ENCODER, "d_model", GONE, "must be given"),
    value(ENCODER, "num_layers", 10**6, "must be at most 256"),
    value(ENCODER, "vocab_size", -1, "must be at least 1"),
    value(ENCODER, "model_type", "bert", "must be 't5' (got 'bert')"),
    value(ENCODER, "relative_attention_num_buckets", 0, "must be at least 4"),
    ("many more words", keys(ENCODER, vocab_size=10_000), ["tokenizer has", "not of one model"]),
    ("fewer words", keys(ENCODER, vocab_size=3), ["tokenizer has", "not of one model"]),
)

JSON = "its unet/config.json must be a JSON object ("
PIPE = "it is a pipe or device, not a file"
FILES: Sequence[Case] = (
    ("a list", content(UNET, "[1]"), [JSON, "got a list"]),
    ("no JSON", content(UNET, "{"), [JSON, "line 1, column 2: "]),
    ("an empty file", content(UNET, ""), [JSON, "line 1, column 1: "]),
    ("deep JSON", content(UNET, '{"a": ' + "[" * 10**5), [JSON, "it is nested too deeply"]),
    ("NaN", content(UNET, '{"norm_eps": NaN}'), [JSON, "JSON has no NaN"]),
    ("many digits", content(UNET, '{"sample_size": ' + "1" * 5000 + "}"), [JSON]),
    ("UTF-16", content(UNET, "{}".encode("utf-16")), ["it is in UTF-16; save it as UTF-8"]),
    ("Windows-1252", content(UNET, b'{"a": "\xe9"}'), ["byte 0xe9 in line 1 is not UTF-8"]),
    ("no configuration", remove(UNET), ["its unet/config.json cannot be read", "no such file"]),
    ("a pipe", replace(UNET, os.mkfifo), ["its unet/config.json cannot be read", PIPE]),
    ("a folder", replace(UNET, Path.mkdir), ["its unet/config.json cannot be read", "a folder"]),
    ("endless", replace(UNET, lambda p: p.symlink_to("/dev/zero")), [PIPE]),
    ("deep index", content(INDEX, '{"a": ' + "[" * 10**5), ["model_index.json must be", "deeply"]),
    ("an empty index", content(INDEX, "{}"), ["needs a model of class IFPipeline"]),
    ("no index", remove(INDEX), ["its model_index.json cannot be read", "no such file"]),
    ("a number as part", keys(INDEX, unet=3), ["its model_index.json names no unet"]),
    ("no UNet", keys(INDEX, unet=[None, None]), ["its model_index.json names no unet"]),
    ("no scheduler", keys(INDEX, scheduler=GONE), ["its model_index.json names no scheduler"]),
    ("no tokenizer", keys(INDEX, tokenizer=GONE), ["its model_index.json names no tokenizer"]),
    ("no text encoder", keys(INDEX, text_encoder=GONE), ["has no text encoder of its own"]),
    ("no noising", remove(NOISING), ["its image_noising_scheduler/", "there is no such file"]),
    (
        "no file of words",
        remove(TOKENIZER),
        ["its tokenizer has no tokenizer.json or spiece.model"],
    ),
    ("no folder of words", remove("stage_1/tokenizer"), ["its tokenizer has no tokenizer.json"]),
    ("no words", content(TOKENIZER, "{}"), ["stage_1' cannot be loaded; correct its files"]),
    ("deep words", content(TOKENIZER, '{"a": ' + "[" * 10**5), ["stage_1' cannot be loaded"]),
    ("other words", content(TOKENIZER, "oops"), ["stage_1' cannot be loaded; correct its files"]),
    ("no schedule", remove("stage_1/scheduler"), ["scheduler_config.json cannot be read"]),
    ("no weights", remove(NET), ["its unet has no weights"]),
    ("no text weights", remove("stage_1/text_encoder/model.safetensors"), ["has no weights"]),
    ("weights of no bytes", content(NET, ""), ["stage_1' cannot be loaded; correct its files"]),
    (
        "a pointer to weights",
        content(NET, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        ["stage_1' cannot be loaded; correct its files, or fetch them again"],
    ),
    ("weights cut off", lambda base: os.truncate(base / NET, 5000), ["cannot be loaded"]),
    (
        "a weight too few",
        weights(lambda tensors: tensors.pop("conv_in.bias")),
        ["missing, or of another shape than config.json says: conv_in.bias"],
    ),
    (
        "a weight of another shape",
        weights(lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)})),
        ["missing, or of another shape than config.json says: conv_in.bias"],
    ),
)


def recipe(folder: Path, base: Path) -> dict[str, str]:
    """The overrides of the embedded recipe that train a base, and write into a folder."""
    return {
        "base.stage_1": f"{base}/stage_1",
        "base.stage_2": f"{base}/stage_2",
        "runs_dir": f"{folder}/runs",
        "cache_dir": f"{folder}/cache",
        "data.source": "datasets/octopus",
        "prior": "null",
        "evaluation": "null",
        "data.prompt": "a sks dog",
        "validation": "{}",
    }


def arguments(overrides: Mapping[str, str]) -> Sequence[object]:
    return "recipes/quickstart.yaml", *(f"{key}={text}" for key, text in overrides.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [case[1:] for case in (*CONFIGURATIONS, *FILES)],
    ids=[case[0] for case in (*CONFIGURATIONS, *FILES)],
)
def test_a_base_is_refused(
    change: Change,
    says: Sequence[str],
    random_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def arrange(folder: Path) -> Sequence[object]:
        for stage in (1, 2):
            shutil.copytree(random_cascade.stage(stage), folder / f"stage_{stage}")
        change(folder)
        return arguments(recipe(folder, folder))

    check_refused(Refused("", arrange, says), main, tmp_path, capsys)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"base.stage_1": "/nowhere/if"}, ["'/nowhere/if' is neither a folder that exists"]),
        ({"base.stage_1": "./nowhere"}, ["'./nowhere' is neither a folder that exists"]),
        ({"base.stage_1": "recipes/quickstart.yaml"}, ["must be a folder, but is a file"]),
        ({"base.stage_1": "models/if-tiny"}, ["models/if-tiny", "model_index.json cannot be read"]),
        ({"base.stage_1": "owner/none"}, ["owner/none", "cache"]),
        ({"base.stage_1": "a b/c"}, ["'a b/c' is neither a folder that exists nor a hub name"]),
        ({"base.stage_1": "x" * 300}, ["error: "]),
        ({"base.stage_1": "STAGE_2"}, ["Stage 1 needs a model of class IFPipeline"]),
        ({"base.stage_2": "STAGE_1"}, ["Stage 2 needs a model of class IFSuperResolution"]),
        (
            {"stage_2.noise_level": "[0, 1000]"},
            ["stage_2.noise_level must be between 0 and 999", "(got [0, 1000])"],
        ),
        ({"stage_1.timesteps.high": "1000"}, ["stage_1.timesteps.high must be between 0 and 999"]),
        (
            {"validation.sampling.stage_2.noise_level": "1000"},
            ["validation.sampling.stage_2.noise_level must be between 0 and 999", "(got 1000)"],
        ),
        (
            {"validation.sampling.stage_2.noise_level": "1000", "stage_2": "null"},
            ["validation.sampling.stage_2.noise_level must be between 0 and 999"],
        ),
        (
            {"validation.sampling.stage_1.steps": "2000"},
            ["validation.sampling.stage_1.steps is 2000, but this cascade allows 1000"],
        ),
        (
            {"prior": "{prompts: [a dog], sampling: {stage_2: {noise_level: 1000}}}"},
            ["prior.sampling.stage_2.noise_level must be between 0 and 999"],
        ),
        ({"runs_dir": "README.md"}, ["README.md/", "cannot be written"]),
        ({"cache_dir": "README.md"}, ["README.md must be a folder, but is a file"]),
        ({"prior": "{prompts: [a dog], folder: nowhere}"}, ["prior.folder 'nowhere' is neither"]),
    ],
    ids=lambda each: "" if isinstance(each, list) else str(each)[:50],
)
def test_settings_that_a_base_does_not_have_are_refused(
    overrides: Mapping[str, str],
    says: Sequence[str],
    random_cascade: RandomCascade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    named = {"STAGE_1": str(random_cascade.stage_1), "STAGE_2": str(random_cascade.stage_2)}
    given = {key: named.get(text, text) for key, text in overrides.items()}
    shown = {} if "prior" in given else {"validation": "{prompts: [a cat]}"}

    def arrange(folder: Path) -> Sequence[object]:
        base = recipe(folder, random_cascade.stage_1.parent)
        return arguments(base | shown | given)

    check_refused(Refused("", arrange, says), main, tmp_path, capsys)


def test_a_revision_without_effect_is_said_once(
    random_cascade: RandomCascade, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert Source(str(random_cascade.stage_1), 1, "v2").picture_size_px == 16
    said = f"The revision 'v2' has no effect on {random_cascade.stage_1}: it is a folder"
    assert capsys.readouterr().err.count(said) == 1


def test_the_home_folder_is_expanded(
    random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(random_cascade.stage_1.parent))
    source = Source("~/stage_1", 1)
    assert source.name == str(random_cascade.stage_1)
    assert source.picture_size_px == 16


def test_an_index_of_shards_leads_nowhere(random_cascade: RandomCascade, tmp_path: Path) -> None:
    """The names of shards tell them; what an index says of other places is not read."""
    model, shards = tmp_path / "model", "diffusion_pytorch_model-#-of-00002.safetensors"
    rewrite(random_cascade.stage_1, model, {"unet": [shards]})
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(b"")
    for place in (str(elsewhere), "../../elsewhere.safetensors"):
        index = model / "unet/diffusion_pytorch_model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"]
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
        unet = Source(str(model), 1).unet("fp32", CPU).state_dict()
        (whole,) = (random_cascade.stage_1 / "unet").glob("*.safetensors")
        assert all(torch.equal(unet[name], own) for name, own in load_file(whole).items())


@pytest.mark.parametrize(
    "change",
    [
        keys(UNET, dropout=0, mid_block_scale_factor=1, layers_per_block=[1, 1]),
        keys(UNET, unknown_key={"deep": [1]}),
        keys(SCHEDULER, clip_sample_range=1, unknown=None),
        content("stage_1/README.md", b"\xff"),
        lambda base: (base / UNET).write_bytes(b"\xef\xbb\xbf" + (base / UNET).read_bytes()),
    ],
    ids=["whole numbers", "an unknown key", "an unknown value", "a README", "a byte-order mark"],
)
def test_an_odd_base_is_right(
    change: Callable[[Path], Any], random_cascade: RandomCascade, tmp_path: Path
) -> None:
    shutil.copytree(random_cascade.stage_1, tmp_path / "stage_1")
    change(tmp_path)
    source = Source(str(tmp_path / "stage_1"), 1)
    check_base(STAGES[1], source, text_width=32)
    source.check_text_parts()
    assert len(source.unet("fp32", CPU).state_dict()) > 100
    assert source.scheduler("scheduler").config.num_train_timesteps == 1000
