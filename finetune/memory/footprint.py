"""What training a stage takes of a GPU, found out on any machine, without weights.

The stage's own step is run on tensors that have no values (:mod:`unets.tally`), so that what is
counted is what will run.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune.recipe.schema import Recipe
from finetune.run.trainee import Trainee
from finetune.step.inputs import Batch, unet_inputs
from finetune.step.optimizers import OPTIMIZERS
from finetune.step.stages import STAGES, Stage
from unets.loading import blank_unet
from unets.tally import META, Tally, reserved, total_bytes

OPERATIONS_A_BYTE = 200
"""How many floating-point operations a GPU does while it moves a byte; data-centre and desktop
cards of the last generations are alike in this (H100: 230, RTX 4090: 165)."""

OPERATIONS_A_KERNEL = 1.5e9
"""How many floating-point operations a GPU could do in the time that a tiny kernel takes."""


@dataclass(frozen=True)
class Footprint:
    """What training takes: bytes by part, and the work of one batch."""

    weights: int
    """The frozen UNet."""
    adapter: int
    """The adapter's weights and gradient, and its average where one is kept."""
    optimizer: int
    """The optimizer's state."""
    activations: int
    """The most that a forward and backward pass holds at once; what a CUDA graph's pool keeps."""
    flops: int
    """Floating-point operations."""
    work: float
    """A measure of the time it takes, to compare settings by: floating-point operations, and those
    that could be done while memory is moved and kernels are started."""

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return self.weights + self.adapter + self.optimizer

    @property
    def reserved(self) -> int:
        """What PyTorch reserves in training."""
        return reserved(self.resident + self.activations)


@dataclass(frozen=True)
class Rehearsal:
    """A stage of a recipe on tensors without values."""

    trainee: Trainee
    optimizer: str
    """The name of the recipe's optimizer."""
    text_tokens: int
    """T, how many tokens a prompt is padded to."""
    low_res_px: int | None
    """The picture size of the stage below; ``None`` in Stage I."""
    guard_bytes: int
    """The safety checker, which visits wherever the stage draws."""
    _drawn: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    """What was found out by :meth:`drawing_bytes`, by pictures."""

    @classmethod
    def of(
        cls, recipe: Recipe, stage: Stage, device: torch.device, text_tokens: int
    ) -> "Rehearsal":
        """Set a stage up as it would be on a device, which need not be there.

        Raises:
            UserError: where the base's configuration is not there, or a target matches nothing.
        """
        training, source = recipe.training(stage), recipe.source(stage)
        name = training.optimizer.name
        # its state is counted by the algorithm's own figure, and not all can be made without a GPU
        plain = training.optimizer.model_copy(update={"name": "adamw_8bit"})
        trainee = Trainee(
            stage,
            training.model_copy(update={"optimizer": plain}),
            blank_unet(source.unet_config, training.precision_on(device), device),
            tuple(source.scheduler(name) for name in stage.schedulers),
            seed=0,
        )
        below = recipe.source(STAGES[1]).picture_size_px if stage.super_resolution else None
        guard = total_bytes(source.guard_weights(trainee.unet.dtype))
        return cls(trainee, name, text_tokens, below, guard)

    def batch(self, batch_size: int) -> Batch:
        """A batch of the stage's shapes."""
        config, dtype = self.trainee.unet.config, self.trainee.unet.dtype
        pixels = torch.empty(batch_size, 3, config.sample_size, config.sample_size, device=META)
        text_size = (batch_size, self.text_tokens, config.encoder_hid_dim)
        integers = torch.empty(batch_size, dtype=torch.int64, device=META)
        low_res = {}
        if self.low_res_px is not None:
            size = (batch_size, 3, self.low_res_px, self.low_res_px)
            low_res = {
                "low_res": torch.empty(size, device=META),
                "low_res_noise": torch.empty_like(pixels),
                "noise_level": torch.empty_like(integers),
            }
        return Batch(
            pixels=pixels,
            prompt_embeds=torch.empty(text_size, dtype=dtype, device=META),
            weight=torch.empty(batch_size, device=META),
            noise=torch.empty_like(pixels),
            timesteps=integers,
            dropout_keys=torch.empty(batch_size, 2, dtype=torch.int64, device=META),
            **low_res,
        )

    def footprint(self, batch_size: int | None = None) -> Footprint:
        """What a training step takes, with the recipe's batch size or another."""
        batch = self.batch(batch_size or self.trainee.training.batch_size)
        with Tally(self._resident(batch)) as tally:
            self.trainee.accumulate(batch)
        algorithm = OPTIMIZERS[self.optimizer]
        return Footprint(
            weights=self.weights_bytes,
            adapter=total_bytes(self._adapter()),
            optimizer=algorithm.state_bytes(self.trainee.weights.slices(whole_tensors=False)),
            activations=tally.peak_bytes,
            flops=tally.flops,
            work=tally.flops
            + OPERATIONS_A_BYTE * tally.moved_bytes
            + OPERATIONS_A_KERNEL * tally.operations,
        )

    @property
    def weights_bytes(self) -> int:
        """The frozen UNet."""
        return total_bytes(self._weights())

    def drawing_bytes(self, pictures: int) -> int:
        """The most that drawing pictures at once holds, each with its unguided twin."""
        if pictures not in self._drawn:
            self._drawn[pictures] = self._draw(pictures) + self.guard_bytes
        return self._drawn[pictures]

    def _draw(self, pictures: int) -> int:
        batch, trainee = self.batch(2 * pictures), self.trainee
        noisy = torch.empty_like(batch.pixels)
        inputs = unet_inputs(trainee.stage, batch, noisy, trainee.schedulers, trainee.unet.dtype)
        resident = [*self._resident(batch), *inputs.values()]
        with trainee.final_weights() as unet, torch.no_grad(), Tally(resident) as tally:
            unet(**inputs)
        return tally.peak_bytes

    def _weights(self) -> list[Tensor]:
        adapter = set(self.trainee.weights.parameters)
        state = self.trainee.unet.state_dict()
        return [tensor for name, tensor in state.items() if name not in adapter]

    def _adapter(self) -> list[Tensor]:
        flat = self.trainee.weights
        vectors = [flat.values, flat.gradient, flat.working, flat.working_gradient]
        return vectors if self.trainee.average is None else [*vectors, self.trainee.average]

    def _resident(self, batch: Batch) -> list[Tensor]:
        return [*self._weights(), *self._adapter(), *batch.tensors().values()]
