"""Adapters that other tools wrote load whole; what is unknown or missing is named."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import Parts, load_cascade
from adapters.errors import UserError
from adapters.files.keys import peft_name
from adapters.files.places import STAGE_FILES
from adapters.files.reading import read_adapter, scaling
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.kinds import ROOTS, AdapterSpec
from benchmarks.random_model import UNETS
from tests.builders.adapters import base_of, export, trained_unet
from tests.builders.drawing import draw, largest_difference
from tests.builders.other_tools import ATTENTION, NAME, SPEC, WRITERS, kohya, name_of, simpletuner
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet, output, unet_inputs


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("write", "spec"), WRITERS, ids=name_of)
def test_every_tensor_is_found(
    random_cascade: RandomCascade,
    tmp_path: Path,
    stage: int,
    write: Callable[[UNet2DConditionModel, Path], Path],
    spec: AdapterSpec,
) -> None:
    unet = trained_unet(base_of(random_cascade, stage), spec)
    expected = get_peft_model_state_dict(unet)
    config, state, _ = read_adapter(write(unet, tmp_path))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    attached = unet.peft_config["default"]
    modules = {name.rsplit(".lora_", 1)[0] for name in expected}
    assert set(config.target_modules) == modules
    assert {scaling(config, name) for name in modules} == {attached.lora_alpha / attached.r}


def test_our_files_have_the_names_that_peft_and_diffusers_look_for() -> None:
    assert STAGE_FILES == (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, LORA_WEIGHT_NAME_SAFE)


ALL = AdapterSpec(rank=2, targets="all")  # as only these tell the random stages apart


@pytest.mark.parametrize(
    ("stage", "write", "spec"), [*((1, *row) for row in WRITERS), (2, kohya, ALL)], ids=name_of
)
def test_our_cascade_finds_the_stage_and_draws_what_was_trained(
    random_cascade: RandomCascade,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    stage: int,
    write: Callable[[UNet2DConditionModel, Path], Path],
    spec: AdapterSpec,
) -> None:
    folders = (random_cascade.stage_1, random_cascade.stage_2)
    unet = trained_unet(base_of(random_cascade, stage), spec)
    path = write(unet, tmp_path)
    trained = draw(load_cascade(*folders, parts=Parts(unets={stage: unet})))
    with caplog.at_level(logging.WARNING, logger="adapters"):
        cascade = load_cascade(*folders, adapters=[path])
    assert [number for number, merged in cascade.merged.items() if merged.adapters] == [stage]
    assert ["does not say which base" in record.message for record in caplog.records] == [True]
    merged, base = draw(cascade), draw(load_cascade(*folders))
    pictures = [vars(images)[f"stage_{stage}"][0] for images in (trained, merged, base)]
    assert largest_difference(pictures[0], pictures[1]) <= 1
    assert largest_difference(pictures[0], pictures[2]) > 1


def test_ranks_and_alphas_by_module(random_cascade: RandomCascade, tmp_path: Path) -> None:
    """A file in which every module has a rank and an alpha of its own, against diffusers' sum."""
    unet = load_unet(random_cascade.stage_1)
    inputs, tensors = unet_inputs(unet), {}
    generator = torch.Generator().manual_seed(0)
    names = [name for name, _ in unet.named_modules() if name.endswith((".to_q", ".to_v"))]
    for index, name in enumerate(names):
        weight = unet.get_submodule(name).weight
        rank, alpha = 1 + index % 3, 0.5 + index % 4
        b = torch.randn(weight.shape[0], rank, generator=generator)
        a = torch.randn(rank, weight.shape[1], generator=generator)
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
        weight.data += alpha / rank * (b @ a)
    save_file(tensors, tmp_path / "last.safetensors")
    cascade = load_cascade(random_cascade.stage_1, adapters=[tmp_path])
    merged = output(cascade.stages[1].unet, inputs)
    torch.testing.assert_close(merged, output(unet, inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [name for name in UNETS if not name.startswith("_")])
def test_flattened_names_of_the_published_unets_are_recovered(size: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[size], encoder_hid_dim_type="text_proj")
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, module in unet.named_modules() if isinstance(module, layers)]
    assert {name.partition(".")[0] for name in names} <= set(ROOTS)
    for name in names:
        flat = name.replace(".", "_")
        assert peft_name(f"lora_unet_{flat}.lora_down.weight") == f"{name}.lora_A.weight"


def a_file(random_cascade: RandomCascade, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    path = simpletuner(trained_unet(random_cascade.stage_1, ATTENTION), folder)
    return path, load_file(path)


FIRST = "down_blocks.1.attentions.0.to_q"

UNUSABLE = {
    "text_encoder.encoder.layers.0.q_proj.lora_A.weight": "adapt a text encoder: save the UNet's",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "adapt a text encoder",
    "transformer.blocks.0.attn.to_q.lora_A.weight": "adapt a transformer, but IF has none",
    "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": "names of the original Stable Diffusion",
    "mid_block.attentions.0.to_q.vera_lambda_b": "no kind of adapter, of an IF UNet",
    "unet.lower_blocks.0.to_q.lora_A.weight": "belong to no module",
    "mid_block.attentions.0.to_q.base_layer.weight": "weights of a model itself: make an adapter",
    "mid_block.resnets.0.conv1.bias": "weights of a model itself",
    "lycoris_mid_block_resnets_0_norm1.w_norm": "change normalisation layers",
    "emb_params": "belong to no known kind of adapter",
    f"unet.{FIRST}.lora.down.weight": "two spellings, or two adapters, of one tensor",
    f"{FIRST}.lora_A.other.weight": "two spellings, or two adapters, of one tensor",
}


@pytest.mark.parametrize(("key", "sentence"), UNUSABLE.items())
def test_an_unusable_key_is_named_with_what_it_does(
    random_cascade: RandomCascade, tmp_path: Path, key: str, sentence: str
) -> None:
    path, tensors = a_file(random_cascade, tmp_path)
    save_file(tensors | {key: torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=sentence) as caught:
        read_adapter(path)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lora_A.weight": None}, f"{FIRST}.lora_A.weight to go with lora_B.weight"),
        ({"lora_B.weight": None}, f"{FIRST}.lora_B.weight to go with lora_A.weight"),
        ({"lora_A.weight": None, "lora_B.weight": None, "alpha": ()}, f"all but {FIRST}.alpha"),
        ({"lora_A.weight": (3, 32)}, r"differ \(.*lora_A.weight \[3, 32\], lora_B.weight \[\d+, 4"),
        ({"lora_mid.weight": (4, 5, 3, 3)}, r"differ \(.*lora_mid.weight \[4, 5, 3, 3\]"),
    ],
)
def test_the_lacking_half_of_a_module_is_named(
    random_cascade: RandomCascade,
    tmp_path: Path,
    change: dict[str, tuple[int, ...] | None],
    sentence: str,
) -> None:
    path, tensors = a_file(random_cascade, tmp_path)
    for part, shape in change.items():
        tensors.pop(f"unet.{FIRST}.{part}", None)
        if shape is not None:
            tensors[f"unet.{FIRST}.{part}"] = torch.ones(shape)
    save_file(tensors, path)
    with pytest.raises(UserError, match=sentence):
        read_adapter(path)


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(rank=3, alpha=2.0),
        AdapterSpec(kind="rslora", rank=2, alpha=5.0, targets="attention+conv"),
        AdapterSpec(kind="dora", rank=2, alpha=1.0),
        AdapterSpec(kind="loha", rank=2, alpha=3.0),
    ],
    ids=lambda spec: spec.kind,
)
def test_what_the_unet_itself_saves_is_what_it_loads(
    random_cascade: RandomCascade, tmp_path: Path, spec: AdapterSpec
) -> None:
    """The header of ``save_lora_adapter`` has PEFT's settings without a prefix."""
    trained_unet(random_cascade.stage_1, spec).save_lora_adapter(tmp_path)
    config, state, _ = read_adapter(tmp_path)
    ours, theirs = (load_unet(random_cascade.stage_1) for _ in range(2))
    inputs = unet_inputs(ours)
    base = output(ours, inputs)
    inject_adapter_in_model(config, ours)
    set_peft_model_state_dict(ours, state)
    if spec.kind == "loha":  # which the UNet saves, and does not load
        theirs = trained_unet(random_cascade.stage_1, spec)
    else:
        theirs.load_lora_adapter(load_file(tmp_path / NAME), prefix=None, metadata=config.to_dict())
        loaded = load_unet(random_cascade.stage_1)
        loaded.load_lora_adapter(str(tmp_path), prefix=None, weight_name=NAME)
        assert torch.equal(output(loaded, inputs), output(theirs, inputs))
    assert torch.equal(output(ours, inputs), output(theirs, inputs))
    merged = load_cascade(random_cascade.stage_1, adapters=[tmp_path]).stages[1].unet
    changed = output(theirs, inputs)
    assert (changed - base).abs().max() > 0.01
    torch.testing.assert_close(output(merged, inputs), changed, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "oft"])
def test_names_of_wrapped_unets_and_of_their_own_state_are_read(
    random_cascade: RandomCascade, tmp_path: Path, kind: str
) -> None:
    spec = AdapterSpec(kind=kind, rank=2)
    base = random_cascade.stage_1
    unet = trained_unet(base, spec)
    folder = export(unet, tmp_path, base, 1, spec).folder
    _, expected, header = read_adapter(folder)
    marks = ("lora_", "hada_", "oft_R")
    own = {k: t for k, t in unet.state_dict().items() if any(mark in k for mark in marks)}
    assert all(".default" in key for key in own)
    for spell in (
        lambda key: key,
        lambda key: key.replace("default", "my_dog"),
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"unet._orig_mod.{key}",
        lambda key: key.replace("attentions.0.", "attentions.0._orig_mod."),
        lambda key: f"base_model.model.{key}",
    ):
        save_file(
            {spell(k): t for k, t in own.items()}, folder / "adapter_model.safetensors", header
        )
        _, state, _ = read_adapter(folder)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_the_header_of_another_model_says_nothing_of_the_unet(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    path, tensors = a_file(random_cascade, tmp_path)
    save_file(tensors, path, metadata={"lora_adapter_metadata": '{"text_encoder.r": 8}'})
    config, *_ = read_adapter(path)
    assert {scaling(config, name) for name in config.target_modules} == {1.0}


def test_which_file_a_folder_means_is_said(random_cascade: RandomCascade, tmp_path: Path) -> None:
    path, tensors = a_file(random_cascade, tmp_path)
    path.unlink()
    for name in ("one", "two"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        UserError, match=r"2 \.safetensors files \(one.safetensors, two.safetensors"
    ):
        load_cascade(random_cascade.stage_1, adapters=[tmp_path])
    load_cascade(random_cascade.stage_1, adapters=[tmp_path / "one.safetensors"])
    for other in ("adapter_model.bin", "last.ckpt"):
        folder = tmp_path / other.partition(".")[2]
        folder.mkdir()
        (folder / other).write_bytes(b"pickle")
        for named in (folder, folder / other):
            with pytest.raises(UserError, match=f"{other} cannot be read, as pickled files"):
                load_cascade(random_cascade.stage_1, adapters=[named])
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match=r"notes.txt is not an adapter: adapters are .safetensors"):
        read_adapter(tmp_path / "notes.txt")


def test_the_scale_of_a_dora_is_that_of_its_whole_change(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    """diffusers scales B A alone and keeps the magnitudes, so that both agree at 1 only."""
    spec = AdapterSpec(kind="dora", rank=2)
    base = random_cascade.stage_1
    folder = export(trained_unet(base, spec), tmp_path, base, 1, spec).folder
    inputs = unet_inputs(load_unet(base))
    cascade = load_cascade(base, adapters={folder: 1.0})
    theirs = load_unet(base)
    theirs.load_lora_adapter(load_file(folder / NAME), prefix="unet", adapter_name="dora")
    weight = theirs.get_submodule(FIRST)
    (name,) = cascade.adapters
    for scale, differs in ((1.0, False), (0.5, True), (0.0, True)):
        cascade.set_adapters({name: scale})
        theirs.set_adapters("dora", scale)
        difference = (output(cascade.stages[1].unet, inputs) - output(theirs, inputs)).abs().max()
        assert (difference > 1e-3) == differs
    plain = weight.get_base_layer().weight
    merged = StageAdapter.load(folder).delta(FIRST, plain) + plain
    cascade.set_adapters({name: 0.5})
    torch.testing.assert_close(
        cascade.stages[1].unet.get_submodule(FIRST).weight, (plain + merged) / 2
    )


def test_other_shapes_and_modules_are_listed(random_cascade: RandomCascade, tmp_path: Path) -> None:
    path, tensors = a_file(random_cascade, tmp_path)
    wider = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[wider] = torch.zeros(4, 3)
    for side, shape in (("A", (4, 8)), ("B", (8, 4))):
        tensors[f"unet.mid_block.attentions.7.to_q.lora_{side}.weight"] = torch.zeros(shape)
    save_file(tensors, path)
    with pytest.raises(UserError, match="fits no UNet here") as caught:
        load_cascade(random_cascade.stage_1, adapters=[path])
    assert wider.removeprefix("unet.") in str(caught.value)
    assert "mid_block.attentions.7.to_q.lora_B.weight" in str(caught.value)


def test_an_adapter_that_fits_both_stages_is_not_guessed_at(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    spec = AdapterSpec(targets=("mid_block.*.to_q",))
    path = kohya(trained_unet(random_cascade.stage_1, spec), tmp_path)
    folders = (random_cascade.stage_1, random_cascade.stage_2)
    with pytest.raises(UserError, match="fits both Stages 1 and 2"):
        load_cascade(*folders, adapters=[path])
    load_cascade(folders[0], adapters=[path])


def test_damaged_and_pickled_files(random_cascade: RandomCascade, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="convert pickled"):
        read_adapter(tmp_path / "adapter_model.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"\0\1\2")
    with pytest.raises(UserError, match=r"broken\.safetensors cannot be read"):
        read_adapter(tmp_path)
    path, tensors = a_file(random_cascade, tmp_path)
    for metadata in ("{", '{"unet.no_such_setting": 1}'):
        save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
        with pytest.raises(UserError, match=r"lora_adapter_metadata of .* is not a PEFT config"):
            read_adapter(path)


@pytest.mark.parametrize("stage", [1, 2])
def test_our_own_files_are_read_as_they_were_exported(
    random_cascade: RandomCascade, tmp_path: Path, stage: int
) -> None:
    base = base_of(random_cascade, stage)
    folder = export(trained_unet(base, SPEC), tmp_path, base, stage, SPEC).folder
    one, other = read_adapter(folder), read_adapter(folder / NAME)
    assert one[1].keys() == other[1].keys()
    assert one[0].target_modules == other[0].target_modules
    load_cascade(**{f"stage_{stage}": base}, adapters=[folder / NAME])
