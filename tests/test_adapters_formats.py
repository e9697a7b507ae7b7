"""Adapters that other tools wrote load whole; what is unknown, missing or unpaired is listed."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import IFPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import load_cascade
from adapters.errors import UserError
from adapters.formats import peft_name, read_adapter, scaling
from adapters.kinds import AdapterSpec
from adapters.names import ROOTS
from benchmarks.random_model import UNETS
from tests.random_cascade import RandomCascade
from tests.test_adapters_export import base_of, export, trained_unet
from tests.test_adapters_kinds import load_unet, output, unet_inputs
from tests.test_cascade import draw, largest_difference

ATTENTION = AdapterSpec(rank=4)
SPEC = AdapterSpec(rank=4, alpha=3.0, targets="attention+conv")
NAME = "pytorch_lora_weights.safetensors"


def diffusers_script(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As the last lines of examples/dreambooth/train_dreambooth_lora.py save; alpha is the rank."""
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=state)
    return folder / NAME


def simpletuner(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As SimpleTuner's checkpoints of IF: PEFT's names, with the configuration in the header."""
    IFPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )
    return folder / NAME


def respelled(unet: UNet2DConditionModel, folder: Path, spell: Callable[[str, str], str]) -> Path:
    """Each module with ``.alpha``, under keys that ``spell`` makes of module and tensor."""
    config = unet.peft_config["default"]
    tensors = {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        module, side = name.rsplit(".lora_", 1)
        tensors[spell(module, f"lora_{side}")] = tensor
        tensors[spell(module, "alpha")] = torch.tensor(float(config.lora_alpha))
    save_file(tensors, folder / "last.safetensors")
    return folder / "last.safetensors"


def kohya(unet: UNet2DConditionModel, folder: Path) -> Path:
    endings = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    return respelled(
        unet, folder, lambda m, t: f"lora_unet_{m.replace('.', '_')}.{endings.get(t, t)}"
    )


def comfyui(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As SimpleTuner writes with ``lora_format=comfyui``."""
    return respelled(unet, folder, lambda module, tensor: f"diffusion_model.{module}.{tensor}")


def attention_processors(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As diffusers wrote before it used PEFT."""
    tensors = {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        module, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        place, projection = module.removesuffix(".0").rsplit(".", 1)
        direction = {"A": "down", "B": "up"}[side]
        tensors[f"unet.{place}.processor.{projection}_lora.{direction}.weight"] = tensor
    save_file(tensors, folder / NAME)
    return folder / NAME


def peft_folder(unet: UNet2DConditionModel, folder: Path) -> Path:
    """As ``PeftModel.save_pretrained``, with endings for targets."""
    targets = {name.rsplit(".lora_", 1)[0] for name in get_peft_model_state_dict(unet)}
    endings = sorted({target.removesuffix(".0").rsplit(".", 1)[1] for target in targets})
    endings = ["to_out.0" if ending == "to_out" else ending for ending in endings]
    attached = unet.peft_config["default"]
    plain = UNet2DConditionModel.from_config(unet.config)
    config = LoraConfig(r=attached.r, lora_alpha=attached.lora_alpha, target_modules=endings)
    model = get_peft_model(plain, config)
    for name, tensor in get_peft_model_state_dict(unet).items():
        module, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        matrix = model.base_model.model.get_submodule(f"{module}.lora_{side}.default")
        matrix.weight.data.copy_(tensor)
    model.save_pretrained(folder)
    return folder


WRITERS = [
    (diffusers_script, ATTENTION),
    (simpletuner, SPEC),
    (kohya, SPEC),
    (comfyui, SPEC),
    (attention_processors, ATTENTION),
    (peft_folder, SPEC),
]


def name_of(value: object) -> str:
    return value.__name__ if callable(value) else ""


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
    assert {scaling(config, state, name) for name in modules} == {attached.lora_alpha / attached.r}


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
    trained = draw(load_cascade(*folders, unets={stage: unet}))
    with caplog.at_level(logging.WARNING, logger="adapters"):
        cascade = load_cascade(*folders, adapters=[path])
    assert [number for number, merged in cascade.merged.items() if merged.adapters] == [stage]
    assert ["does not say on which base" in record.message for record in caplog.records] == [True]
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


def test_unknown_unpaired_and_doubled_keys_are_listed(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    path, tensors = a_file(random_cascade, tmp_path)
    first, second, *_ = (key for key in tensors if key.endswith("lora_A.weight"))
    del tensors[second]
    doubled = first.replace(".lora_A.weight", ".lora.down.weight")
    unknown = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    tensors |= {doubled: tensors[first].clone(), unknown: torch.zeros(1), "emb.x": torch.zeros(1)}
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        read_adapter(path)
    for key in (unknown, "emb.x", doubled, first, second.replace("lora_A", "lora_B")):
        assert key in str(caught.value)


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
    with pytest.raises(UserError, match="fits those of Stage 1 and 2"):
        load_cascade(*folders, adapters=[path])
    load_cascade(folders[0], adapters=[path])


def test_damaged_and_pickled_files(random_cascade: RandomCascade, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="convert pickled files"):
        read_adapter(tmp_path / "adapter_model.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"\0\1\2")
    with pytest.raises(UserError, match=r"broken\.safetensors cannot be read"):
        read_adapter(tmp_path)
    path, tensors = a_file(random_cascade, tmp_path)
    for metadata in ("{", '{"unet.no_such_setting": 1}'):
        save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
        with pytest.raises(UserError, match=r"lora_adapter_metadata of .* is no PEFT config"):
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
