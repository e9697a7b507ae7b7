"""Several adapters at once: exact, in any order, in place, and gone without a trace."""

from pathlib import Path

import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapters import Cascade, Parts, load_cascade
from adapters.files.export import AdapterInfo, Exported, export_adapter
from adapters.weights.kinds import AdapterSpec, adapter_state, attach
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet


def cascade_of(
    cascade: RandomCascade,
    precision: str = "fp32",
    stages: tuple[int, ...] = (1,),
    parts: Parts | None = None,
    **options: object,
) -> Cascade:
    places = {1: cascade.stage_1, 2: cascade.stage_2}
    return load_cascade(
        **{f"stage_{stage}": places[stage] for stage in stages},
        dtype=precision,
        device="cpu",
        **options,
        parts=parts or Parts(text_encoder=False),
    )


def layers(cascade: Cascade) -> dict[str, nn.Module]:
    return {
        f"{stage}.{name}": module
        for stage, pipe in cascade.stages.items()
        for name, module in pipe.unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def weights(cascade: Cascade) -> dict[str, Tensor]:
    """As the layers compute with them."""
    return {name: layer.weight.detach().clone() for name, layer in layers(cascade).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PIPELINES = {1: IFPipeline, 2: IFSuperResolutionPipeline}

DIFFUSERS_SPECS = [
    AdapterSpec(kind="lora", rank=4, alpha=6.0),
    AdapterSpec(kind="lora", rank=4, alpha=2.5, targets="attention+conv"),
    AdapterSpec(kind="lora", rank=2, targets="all"),
    AdapterSpec(kind="rslora", rank=4, alpha=6.0),
    AdapterSpec(kind="dora", rank=4, alpha=6.0, targets="attention+conv"),
]

PEFT_SPECS = [
    AdapterSpec(kind="loha", rank=2, alpha=3.0, targets="attention+conv"),
    AdapterSpec(kind="lokr", rank=2, alpha=3.0, targets="attention+conv"),
    AdapterSpec(kind="oft", rank=4),
]


def name_of(value: object) -> str:
    return f"{value.kind}-{value.targets}" if isinstance(value, AdapterSpec) else f"stage_{value}"


def trained_unet(base: Path, spec: AdapterSpec, seed: int = 0) -> UNet2DConditionModel:
    """A UNet whose adapter has random values, as if trained."""
    unet = load_unet(base)
    generator = torch.Generator().manual_seed(seed)
    attach(unet, spec)
    for tensor in adapter_state(unet).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return unet


def export(
    unet: UNet2DConditionModel,
    folder: Path,
    base: Path,
    stage: int,
    spec: AdapterSpec,
    *,
    sampling: dict[str, dict[str, int | float | str | None]] | None = None,
    **options: int,
) -> Exported:
    info = AdapterInfo(
        base_model=str(base),
        stage=stage,
        spec=spec,
        prompts=("a sks cat",),
        step=7,
        recipe="name: test\n",
        version="1.2.3",
        sampling=sampling,
    )
    return export_adapter(unet, folder, info, **options)


def base_of(cascade: RandomCascade, stage: int) -> Path:
    return {1: cascade.stage_1, 2: cascade.stage_2}[stage]


def updates(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """What merging an attached adapter adds to each weight, as PEFT itself has it."""
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)}
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers.items()}
    unet.fuse_lora()
    after = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    return {name: (after[name] - before[name]).flatten(1) for name in layers}


def block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 1 if parts[0] == "mid_block" else 2])
