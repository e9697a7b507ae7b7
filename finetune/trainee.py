"""The UNet being taught, and all the state that training it changes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from adapters.kinds import attach
from finetune.losses import Losses, NoiseTables, hybrid_loss
from finetune.optimizers import averaged_weights, build_optimizer
from finetune.recipe import Optimizer, Training
from finetune.stages import Batch, Stage, noised


def optimizer_of(
    options: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that a recipe asks for."""
    return build_optimizer(
        options.name,
        parameters,
        learning_rate=options.learning_rate,
        betas=options.betas,
        weight_decay=options.weight_decay,
        lora_plus_ratio=options.lora_plus_ratio,
    )


@dataclass
class Trainee:
    """A frozen UNet with an adapter, the adapter's optimizer, and how far training has come.

    ``state`` and ``load_state`` are all that a checkpoint needs; ``accumulate`` and ``update``
    are all that a step does. Both are functions of tensors with fixed shapes and never wait for
    the device.
    """

    stage: Stage
    training: Training
    unet: UNet2DConditionModel
    schedulers: tuple[DDPMScheduler, ...]
    tables: NoiseTables
    parameters: Mapping[str, nn.Parameter]
    """The adapter's parameters by name, float32: the only ones that train."""
    optimizer: torch.optim.Optimizer
    gradient: Tensor
    """One flat buffer that every parameter's gradient is a view of."""
    average: dict[str, Tensor] | None
    """The exponential moving average of the parameters, where the recipe keeps one."""
    step: int = field(default=0)

    @classmethod
    def of(
        cls,
        stage: Stage,
        training: Training,
        unet: UNet2DConditionModel,
        schedulers: tuple[DDPMScheduler, ...],
        *,
        seed: int,
    ) -> "Trainee":
        """Attach a fresh adapter to a UNet and make its optimizer."""
        parameters = attach(unet, training.adapter, seed=seed)
        if training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        gradient = torch.zeros(sum(p.numel() for p in parameters.values()), device=unet.device)
        views = torch.split(gradient, [p.numel() for p in parameters.values()])
        for parameter, view in zip(parameters.values(), views, strict=True):
            parameter.grad = view.view_as(parameter)
        return cls(
            stage=stage,
            training=training,
            unet=unet,
            schedulers=schedulers,
            tables=NoiseTables.of(schedulers[0], unet.device),
            parameters=parameters,
            optimizer=optimizer_of(training.optimizer, parameters),
            gradient=gradient,
            average=None
            if training.ema_decay is None
            else {name: p.detach().clone() for name, p in parameters.items()},
        )

    def accumulate(self, batch: Batch) -> Losses:
        """Add a batch's gradients, and return its losses."""
        noisy = noised(batch, self.schedulers[0])
        inputs = self.stage.unet_inputs(batch, noisy, self.schedulers, self.unet.dtype)
        prediction = self.unet(**inputs, return_dict=False)[0]
        losses = hybrid_loss(
            prediction,
            batch.pixels,
            batch.noise,
            noisy,
            batch.timesteps,
            self.tables,
            min_snr_gamma=self.training.min_snr_gamma,
        )
        ((losses.total * batch.weight).sum() / self.training.accumulation).backward()  # type: ignore[no-untyped-call]
        return losses

    def update(self) -> Tensor:
        """Take an optimizer step with the gradients so far, and return their norm."""
        norm = self.gradient.norm()
        if self.training.optimizer.max_grad_norm is not None:
            self.gradient.mul_((self.training.optimizer.max_grad_norm / norm).clamp(max=1))
        self.optimizer.step()
        self.gradient.zero_()
        if self.average is not None:
            weight = 1 - (self.training.ema_decay or 0)
            torch._foreach_lerp_(list(self.average.values()), list(self._tensors()), weight)
        self.step += 1
        return norm

    def _tensors(self) -> Iterator[Tensor]:
        return (parameter.detach() for parameter in self.parameters.values())

    @contextmanager
    def final_weights(self) -> Iterator[UNet2DConditionModel]:
        """The UNet as it would be exported now: evaluating, with averaged weights where kept."""
        trained = [tensor.clone() for tensor in self._tensors()]
        self.unet.eval()
        with averaged_weights(self.optimizer) if self.average is None else nullcontext():
            if self.average is not None:
                self._overwrite(self.average.values())
            yield self.unet
        self._overwrite(trained)
        self.unet.train()

    def _overwrite(self, values: Any) -> None:
        for tensor, value in zip(self._tensors(), values, strict=True):
            tensor.copy_(value)

    def state(self) -> dict[str, Any]:
        """All that training has changed, as a tree of tensors and plain values."""
        return {
            "step": self.step,
            "parameters": dict(self.parameters),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same recipe."""
        self.step = state["step"]
        self._overwrite(state["parameters"][name] for name in self.parameters)
        if self.average is not None:
            for name, tensor in self.average.items():
                tensor.copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
