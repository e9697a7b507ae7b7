"""The gradient of every trainable tensor, against plain PEFT on a plain diffusers UNet in float64.

The reference shares nothing with the product but the base's files and the adapter's values: neither
its layers, nor its conditioning, nor its loss.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from adapters.weights.kinds import ADAPTER_NAME, KINDS, PRESETS, AdapterSpec, adapter_parameters
from finetune.run.trainee import Trainee
from finetune.step.inputs import Batch
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import made_batches, recipe_of
from tests.builders.small_runs import trainee_of as trainee_of_run
from tests.builders.trainees import batch_of, trainee_of
from unets.frozen import Quantised
from unets.precision import Precision

TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-4, "bf16": 3e-2, "int8": 1e-4, "nf4": 1e-4}
"""By the frozen UNet's precision on a CPU, where quantised UNets compute in float32."""

ON_GPU = dict(TOLERANCE) | {"int8": 3e-2, "nf4": 3e-2}

ROWS = [
    (kind, preset, stage)
    for kind, row in KINDS.items()
    for preset in PRESETS
    for stage in (1, 2)
    if preset != "attention+conv" or row.convolutions
]

SPECS = {kind: AdapterSpec(kind=kind, rank=3, alpha=5.0, targets="all") for kind in KINDS}


@pytest.fixture(scope="module")
def random_cascade(wide_cascade: RandomCascade) -> RandomCascade:
    """The one whose sums are long enough for the tolerances, which are those of rounding."""
    return wide_cascade


@pytest.mark.parametrize(("kind", "preset", "stage"), ROWS)
def test_every_gradient_is_that_of_plain_peft(
    random_cascade: RandomCascade, kind: str, preset: str, stage: int
) -> None:
    spec = AdapterSpec(kind=kind, rank=3, alpha=5.0, targets=preset)
    check_gradients(random_cascade, stage, "fp32", TOLERANCE["fp32"], adapter=spec)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_that_of_plain_peft_on_the_base_as_it_is_kept(
    random_cascade: RandomCascade, kind: str, precision: Precision
) -> None:
    check_gradients(random_cascade, 1, precision, TOLERANCE[precision], adapter=SPECS[kind])


@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "fp32") for kind in KINDS), ("lora", "int8"), ("dora", "nf4")]
)
def test_gradients_of_preserved_rows_are_those_of_their_distance_from_the_base(
    random_cascade: RandomCascade, kind: str, precision: Precision
) -> None:
    """From the base as it is kept, beside rows with the loss that IF was trained with."""
    rows = torch.tensor([1, 4, 5])
    check_gradients(
        *(random_cascade, 2 if precision == "fp32" else 1, precision, TOLERANCE[precision]),
        preserved=rows,
        adapter=SPECS[kind],
    )


def test_the_loss_of_a_runs_batch_is_its_formula(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    """Three pictures learnt and three preserved, whose target PEFT predicts without its adapter."""
    prior = {"kind": "output", "prompts": ["a dog", "a cat"], "weight": 0.7, "share": 0.5}
    settings: dict[str, Any] = {"batch_size": 6, "timesteps": {"low": 1}}
    recipe = recipe_of(random_cascade, tmp_path, stage=settings, prior=prior)
    trainee, batch = trainee_of_run(recipe), made_batches(recipe)(0)
    draw = torch.Generator().manual_seed(0)
    trainee.weights.values += 0.02 * torch.randn(trainee.weights.values.shape, generator=draw)
    trainee.weights.publish()
    losses = trainee.accumulate(batch)
    unet = plain_peft(random_cascade.stage_1, trainee)

    def without_adapter(*inputs: Tensor, **labels: Tensor) -> Any:
        unet.disable_adapters()
        prediction = unet(*inputs, **labels)
        unet.enable_adapters()
        return prediction

    with torch.no_grad():
        weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.7 / 3, 0.7 / 3, 0.7 / 3])
        expected = loss_in_float64(unet, without_adapter, trainee, replace(batch, weight=weights))
    assert batch.preserved is not None
    assert batch.preserved.tolist() == [3, 4, 5]
    found = (losses.total * batch.weight).sum().double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert losses.preservation is not None
    assert losses.preservation[3:].min() > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "how"),
    [
        *((precision, "eager") for precision in TOLERANCE),
        ("bf16", "recorded"),
        ("bf16", "compiled"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_every_gradient_is_that_of_plain_peft(
    random_cascade: RandomCascade, kind: str, precision: Precision, how: str
) -> None:
    torch.backends.cudnn.allow_tf32 = False
    tolerance = ON_GPU[precision]
    check_gradients(random_cascade, 1, precision, tolerance, how=how, adapter=SPECS[kind])


def check_gradients(
    cascade: RandomCascade,
    stage: int,
    precision: Precision,
    tolerance: float,
    *,
    how: str | None = None,
    preserved: Tensor | None = None,
    **options: object,
) -> None:
    """Assert that a trainee's gradients are the reference's, naming the tensors that are off."""
    base = (cascade.stage_1, cascade.stage_2)[stage - 1]
    device = "cpu" if how is None else "cuda"
    trainee = trainee_of(base, stage, precision, device=device, **options)
    draw = torch.Generator().manual_seed(0)
    moved = 0.02 * torch.randn(trainee.weights.values.shape, generator=draw)
    trainee.weights.values += moved.to(device)  # B is zero at first, and A then has no gradient
    trainee.weights.publish()
    size_px = {1: 16, 2: 24}[stage]  # a seventh of the pixels that Stage II has; it still enlarges
    random = batch_of(trainee, pictures=8, size_px=size_px)
    batch = replace(coherent(random), preserved=preserved)
    if how == "compiled":
        trainee.compile()
    for _ in range(3 if how == "recorded" else 1):  # the third call replays
        trainee.weights.gradient.zero_()
        trainee.accumulate(batch.to(trainee.unet.device))
    gradients = trainee.weights.views(trainee.weights.gradient)
    expected = reference_gradients(base, trainee, batch)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == len({name for name, _ in trainable(trainee)})
    off = {}
    for name, right in expected.items():
        error = (gradients[name].cpu().double() - right).norm() / right.norm()
        if not error <= tolerance:
            off[name] = round(float(error), 5)
    assert not off, f"{len(off)} of {len(expected)} gradients are off: {off}"


def coherent(batch: Batch) -> Batch:
    """A batch whose noise has a mean of 2.

    The gradients of its pixels then point one way and add up, where those of usual noise cancel and
    leave the rounding of bfloat16 behind: 3 % of a gradient for them, 1 % for these.
    """
    return replace(batch, noise=2 + 0.2 * batch.noise)


def trainable(trainee: Trainee) -> list[tuple[str, torch.nn.Parameter]]:
    """The UNet's parameters that are called trainable."""
    return [(name, p) for name, p in trainee.unet.named_parameters() if p.requires_grad]


def reference_gradients(base: Path, trainee: Trainee, batch: Batch) -> dict[str, Tensor]:
    """The gradients of a trainee's loss by its adapter's parameters, in float64 on the CPU."""
    unet = plain_peft(base, trainee)
    base_unet = copy.deepcopy(unet).eval()
    base_unet.disable_adapters()
    loss_in_float64(unet, base_unet, trainee, batch).backward()
    return {name: parameter.grad for name, parameter in adapter_parameters(unet).items()}


def plain_peft(base: Path, trainee: Trainee) -> UNet2DConditionModel:
    """Diffusers' UNet in float64, with a trainee's base as it is kept, and its adapter by PEFT."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").double().train()
    ours = dict(trainee.unet.named_modules())
    with torch.no_grad():
        for name, module in unet.named_modules():
            layer = ours[name]
            layer = getattr(layer, "base_layer", layer)
            if isinstance(layer, Quantised):
                module.weight.copy_(layer.weight)
            for part, value in module.named_parameters(recurse=False):
                if not isinstance(layer, Quantised) or part != "weight":
                    value.copy_(layer.get_parameter(part))
    unet.add_adapter(trainee.unet.peft_config[ADAPTER_NAME], adapter_name=ADAPTER_NAME)
    unet.double()
    parameters = adapter_parameters(unet)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trainee.weights.parameters[name])
    return unet


def loss_in_float64(
    unet: UNet2DConditionModel, base: Callable[..., Any], trainee: Trainee, batch: Batch
) -> Tensor:
    """L_hybrid of a batch (Improved DDPM, section 3 and 4), straight from the definitions.

    Of preserved rows it is the distance from the base's prediction instead.
    """
    rounded = trainee.unet.dtype
    betas = trainee.schedulers[0].betas.double()
    bars = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])

    def at(table: Tensor) -> Tensor:
        return table[batch.timesteps].view(-1, 1, 1, 1)

    x0, noise = batch.pixels.double(), batch.noise.double()
    noisy = at(bars).sqrt() * x0 + (1 - at(bars)).sqrt() * noise
    sample = noisy.to(rounded).double()
    labels = {}
    if trainee.stage.super_resolution:
        assert batch.low_res is not None
        assert batch.noise_level is not None
        size = batch.pixels.shape[-2:]
        enlarged = F.interpolate(batch.low_res, size, mode="bilinear", align_corners=True)
        own: DDPMScheduler = trainee.schedulers[1]
        low_res = own.add_noise(enlarged, batch.low_res_noise, batch.noise_level)
        sample = torch.cat([sample, low_res.to(rounded).double()], dim=1)
        labels = {"class_labels": batch.noise_level}
    text = batch.prompt_embeds.to(rounded).double()
    prediction = unet(sample, batch.timesteps, text, **labels).sample
    epsilon, v = prediction.chunk(2, dim=1)
    mse = (epsilon - noise).square().mean(dim=(1, 2, 3))

    def mean(e: Tensor) -> Tensor:  # Ho et al., eq. 11
        return (noisy - at(betas) / (1 - at(bars)).sqrt() * e) / (1 - at(betas)).sqrt()

    true = at(betas * (1 - before) / (1 - bars))
    log_variance = (v + 1) / 2 * at(betas).log() + (1 - v) / 2 * true.log()
    difference = (mean(noise) - mean(epsilon.detach())).square()
    nats = 0.5 * (log_variance - true.log() - 1 + (true + difference) / log_variance.exp())
    bound = nats.mean(dim=(1, 2, 3)) / torch.tensor(2.0).double().log()
    losses = mse + bound
    if batch.preserved is not None:
        with torch.no_grad():
            target = base(sample, batch.timesteps, text, **labels).sample
        distance = (prediction - target).square().mean(dim=(1, 2, 3))
        is_preserved = torch.zeros(len(losses), dtype=torch.bool)
        is_preserved[batch.preserved] = True
        losses = torch.where(is_preserved, distance, losses)
    return (losses * batch.weight).sum()
