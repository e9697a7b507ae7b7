"""A UNet in training and a batch for it, as tests need them."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler

from adapters.base.source import Source
from finetune.recipe.schema import Optimizer, Training
from finetune.run.trainee import Trainee
from finetune.step.inputs import Batch
from finetune.step.stages import STAGES
from unets.precision import Precision


def trainee_of(
    base: Path,
    stage: int,
    precision: Precision = "fp32",
    *,
    device: str = "cpu",
    **options: object,
) -> Trainee:
    """A trainee as a run builds it, with a learning rate of 0.01 unless ``options`` give another.

    Args:
        base: the model's folder.
        stage: its number.
        precision: of the frozen UNet.
        device: where it trains.
        options: fields of its ``Training`` section.
    """
    training = Training(steps=10, **{"optimizer": Optimizer(learning_rate=1e-2), **options})
    unet = Source(str(base), stage).unet(precision, torch.device(device))
    schedulers = tuple(
        DDPMScheduler.from_pretrained(base, subfolder=name) for name in STAGES[stage].schedulers
    )
    return Trainee(STAGES[stage], training, unet, schedulers, seed=0)


def batch_of(
    trainee: Trainee,
    index: int = 0,
    pictures: int = 2,
    step_key: int = 2**61 + 12345,
    *,
    size_px: int | None = None,
) -> Batch:
    """Random pictures, each with seven random text tokens, on the CPU.

    Args:
        trainee: for which they are.
        index: the batch's, from which all is drawn.
        pictures: their number.
        step_key: of the step's dropout.
        size_px: their sides; ``None``: those that the model draws. It takes any multiple of 4.
    """
    draw = torch.Generator().manual_seed(index)
    config = trainee.unet.config
    side = size_px or config.sample_size
    shape = (pictures, 3, side, side)
    second = trainee.stage.super_resolution
    return Batch(
        pixels=torch.rand(shape, generator=draw) * 2 - 1,
        prompt_embeds=torch.randn((pictures, 7, config.encoder_hid_dim), generator=draw),
        weight=torch.full((pictures,), 1 / pictures),
        noise=torch.randn(shape, generator=draw),
        timesteps=torch.randint(300, 700, (pictures,), generator=draw),
        low_res=torch.rand((pictures, 3, 16, 16), generator=draw) * 2 - 1 if second else None,
        low_res_noise=torch.randn(shape, generator=draw) if second else None,
        noise_level=torch.randint(1000, (pictures,), generator=draw) if second else None,
        dropout_keys=torch.stack(
            [torch.randint(2**62, (pictures,), generator=draw), torch.full((pictures,), step_key)],
            dim=1,
        ),
    )


def take_steps(trainee: Trainee, count: int) -> list[float]:
    """Take steps on one batch each, and return their losses."""
    losses = []
    for _ in range(count):
        batch = batch_of(trainee, trainee.step).to(trainee.unet.device)
        losses.append(trainee.accumulate(batch).total.mean().item())
        trainee.update()
    return losses
