"""Frozen, quantised and fused UNets against diffusers' own."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from diffusers import IFPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import load_cascade
from adapters.base.source import Source
from adapters.errors import UserError
from adapters.files.export import export_adapter
from adapters.files.info import AdapterInfo
from adapters.weights.kinds import AdapterSpec, attach
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import inputs_of
from unets.blocks import FusedResnetBlock2D, RowAttention, fuse_blocks, with_dense_gradient
from unets.frozen import FORMATS, Quantised, freeze, quantisable, quantise
from unets.lora_layers import AdaptedLinear, fuse_adapters

CPU = torch.device("cpu")


def check_fusing(
    unet: UNet2DConditionModel,
    fuse: Callable[[UNet2DConditionModel], None],
    parameters: Iterable[nn.Parameter] = (),
) -> None:
    """Fusing changes neither the output nor the gradients of the input and of parameters."""
    inputs = inputs_of(unet)
    wanted = [inputs["sample"].requires_grad_(), *parameters]
    results = []
    for prepare in (lambda unet: None, fuse):
        prepare(unet)
        output = unet(**inputs).sample
        results.append((output, *torch.autograd.grad(output.square().sum(), wanted)))
    for plain, fused in zip(*results, strict=True):
        assert torch.allclose(plain, fused, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_base_whose_weights_are_not_numbers_is_refused(
    random_cascade: RandomCascade, tmp_path: Path, value: float
) -> None:
    """Before anything is drawn or trained: pictures would be black, and the loss no number."""
    shutil.copytree(random_cascade.stage_1, tmp_path, dirs_exist_ok=True)
    base = Source(str(tmp_path), 1)
    loads: dict[str, Callable[[], object]] = {
        "unet/diffusion_pytorch_model.safetensors": lambda: base.unet("fp32", CPU),
        "text_encoder/model.safetensors": lambda: base.text_encoder("bf16", CPU),
    }
    for file, load in loads.items():
        load()
        weights = load_file(tmp_path / file)
        name = max(weights, key=lambda name: weights[name].numel())
        weights[name].view(-1)[7] = value
        save_file(weights, tmp_path / file, {"format": "pt"})
        with pytest.raises(UserError, match=f"{file}: {name} has values that are NaN or inf"):
            load()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_loaded_unet_is_the_one_that_diffusers_loads(
    random_cascade: RandomCascade, stage: int
) -> None:
    place = random_cascade.stage(stage)
    theirs = UNet2DConditionModel.from_pretrained(place, subfolder="unet").eval()
    theirs.requires_grad_(False)  # of trainable weights PyTorch may choose other kernels
    ours = Source(str(place), stage).unet("fp32", CPU)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    inputs = inputs_of(ours)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).sample, theirs(**inputs).sample)


@pytest.mark.parametrize("stage", [1, 2])
def test_fused_blocks_compute_what_diffusers_computes(
    random_cascade: RandomCascade, stage: int
) -> None:
    unet = Source(str(random_cascade.stage(stage)), stage).unet("fp32", CPU)
    check_fusing(unet, fuse_blocks)
    assert any(isinstance(block, FusedResnetBlock2D) for block in unet.modules())
    assert {type(each) for each in unet.attn_processors.values()} == {RowAttention}


@pytest.mark.parametrize("channels", [8, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_part_arrives_in_one_piece(channels: int, dtype: torch.dtype) -> None:
    def gradient(of: tuple[int, ...], layout: torch.memory_format) -> torch.Tensor:
        x = torch.zeros(of, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        arrived: list[torch.Tensor] = []
        passed = with_dense_gradient(x * 1)
        passed.register_hook(arrived.append)
        joined = torch.cat([passed, torch.ones_like(x)], dim=1)
        torch.manual_seed(0)
        dy = torch.randn(joined.shape).to(dtype).contiguous(memory_format=layout)
        joined.backward(dy)
        assert torch.equal(x.grad, dy[:, : of[1]])
        return arrived[0]

    pictures = gradient((2, channels, 4, 4), torch.channels_last)
    assert pictures.is_contiguous(memory_format=torch.channels_last)
    assert gradient((2, 5, channels), torch.contiguous_format).is_contiguous()


@pytest.mark.parametrize("alpha", [4, 6])
def test_a_fused_lora_computes_what_peft_computes(
    random_cascade: RandomCascade, alpha: int
) -> None:
    unet = Source(str(random_cascade.stage_1), 1).unet("fp32", CPU).train()
    parameters = attach(unet, AdapterSpec(alpha=alpha))
    for index, parameter in enumerate(parameters.values()):
        torch.manual_seed(index)
        nn.init.normal_(parameter, std=0.1)
    check_fusing(unet, fuse_adapters, parameters.values())
    assert any(isinstance(layer, AdaptedLinear) for layer in unet.modules())


def test_a_fused_lora_does_what_peft_is_asked_for(random_cascade: RandomCascade) -> None:
    """PEFT itself runs dropout, float32 in a UNet of bf16, and layers without an adapter."""
    unet = Source(str(random_cascade.stage_1), 1).unet("bf16", CPU).train()
    attach(unet, AdapterSpec(dropout=0.5))
    fuse_adapters(unet)
    layer = unet.mid_block.attentions[0].to_q
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(1, 3, layer.in_features).bfloat16()
    base = layer.base_layer(x)
    assert not torch.equal(layer(x), layer(x))  # dropout draws
    layer.eval()
    assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), base)
    unet.disable_adapters()
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_layer_is_the_plain_layer_of_its_restored_weight(format: str) -> None:  # noqa: A002
    torch.manual_seed(0)
    kept: list[torch.Tensor] = []
    for kind, sizes, shape in (
        (nn.Linear, (64, 96), (5, 64)),
        (nn.Conv2d, (64, 32, 3, 2, 1), (2, 64, 9, 9)),
    ):
        layer, twin = kind(*sizes), kind(*sizes)
        original = layer.weight.detach().clone()
        freeze(layer)
        quantise(layer, original, format, torch.float32)
        error = (layer.weight - original).norm() / original.norm()
        assert error < {"int8": 0.02, "nf4": 0.15}[format]
        twin.load_state_dict({"weight": layer.weight.contiguous(), "bias": layer.bias})
        x = torch.randn(shape, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            output = layer(x)
        assert kept == []  # neither the input nor the restored weight is held
        assert torch.allclose(output, twin(x), atol=1e-5)
        dy = torch.randn_like(output)
        mine, theirs = (torch.autograd.grad(y, x, dy)[0] for y in (output, twin(x)))
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_nf4_is_bitsandbytes_own() -> None:
    layer = nn.Linear(64, 96)
    weight = layer.weight.detach().clone()
    freeze(layer)
    quantise(layer, weight, "nf4", torch.float32)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(layer.weight, bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_unet_stores_its_convolutions_and_linears_quantised(
    random_cascade: RandomCascade,
    stage: int,
    format: str,  # noqa: A002
) -> None:
    source = Source(str(random_cascade.stage(stage)), stage)
    plain, unet = source.unet("fp32", CPU), source.unet(format, CPU)
    quantised = {name for name, module in unet.named_modules() if isinstance(module, Quantised)}
    assert quantised == set(quantisable(plain))
    kinds = {type(plain.get_submodule(name)).__name__ for name in quantised}
    assert kinds == {"FrozenLinear", "FrozenConv2d"}
    inputs = inputs_of(unet)
    with torch.no_grad():
        exact, rounded = plain(**inputs).sample, unet(**inputs).sample
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.5


def test_an_adapter_merges_into_a_quantised_base_and_out_again(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    unet = Source(str(random_cascade.stage_1), 1).unet("nf4", CPU)
    attach(unet, AdapterSpec(targets="attention+conv"))
    for name, parameter in unet.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    info = AdapterInfo(
        base_model="base", stage=1, spec=AdapterSpec(), step=1, recipe="", version="0"
    )
    export_adapter(unet, tmp_path, info)
    cascade = load_cascade(random_cascade.stage_1, dtype="nf4", device="cpu")
    base = cascade.stages[1].unet
    inputs = inputs_of(base)
    with torch.no_grad():
        trained, before = unet(**inputs).sample, base(**inputs).sample
        cascade.add_adapter(tmp_path)
        assert torch.allclose(base(**inputs).sample, trained, atol=1e-4)
        assert not torch.allclose(before, trained, atol=1e-3)
        cascade.remove_adapters()
        assert torch.equal(base(**inputs).sample, before)


def test_weights_in_several_files_and_variants_load(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    pipe = IFPipeline.from_pretrained(random_cascade.stage_1)
    pipe.unet.half().save_pretrained(tmp_path / "unet", max_shard_size="100KB", variant="fp16")
    shutil.copy(random_cascade.stage_1 / "model_index.json", tmp_path)
    unet = Source(str(tmp_path), 1, variant="fp16").unet("fp32", CPU)
    for name, parameter in pipe.unet.named_parameters():
        assert torch.equal(parameter.float(), unet.get_parameter(name))
    with pytest.raises(UserError, match="its unet has only weights of the variant fp16"):
        Source(str(tmp_path), 1).unet("fp32", CPU)
    shard = sorted((tmp_path / "unet").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=r"shards of its unet, 1 are missing \(number 1\); there"):
        Source(str(tmp_path), 1, variant="fp16").unet("fp32", CPU)
