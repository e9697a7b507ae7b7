"""The UNet in training, and all the state that training changes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adapters.weights.kinds import KINDS, attach, without_adapter
from finetune.recipe.schema import Training
from finetune.step.flat_weights import FlatWeights
from finetune.step.gradients import GradientWatch
from finetune.step.inputs import Batch, add_noise, unet_inputs
from finetune.step.losses import Losses, NoiseTables, hybrid_loss, preservation_loss
from finetune.step.optimizers import OPTIMIZERS, averaged_weights, build_optimizer
from finetune.step.stages import Stage
from unets.dropout import key_dropout
from unets.graphs import Replayed
from unets.lora_layers import fuse_adapters


class Trainee:
    """A frozen UNet with a fresh adapter, the adapter's optimizer, and the progress of training.

    A checkpoint holds :meth:`state`; a step is :meth:`accumulate`, then :meth:`update`. These two
    are functions of tensors with fixed shapes and never wait for the device, so that on a GPU
    ``accumulate`` can be one CUDA graph.
    """

    def __init__(
        self,
        stage: Stage,
        training: Training,
        unet: UNet2DConditionModel,
        schedulers: tuple[DDPMScheduler, ...],
        *,
        seed: int,
    ) -> None:
        self.stage, self.training, self.unet, self.schedulers = stage, training, unet, schedulers
        self.step = 0
        parameters = attach(unet, training.adapter, seed=seed)
        if unet.device.type != "cpu":
            fuse_adapters(unet)
        self.dropout_keys = key_dropout(unet, training.adapter.dropout)
        if training.gradient_checkpointing:  # nothing draws, so there is no random state
            unet.enable_gradient_checkpointing(
                partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            )
        unet.train()
        as_unet = KINDS[training.adapter.kind].trains_in_unet_precision
        self.weights = FlatWeights(parameters, unet.dtype if as_unet else torch.float32)
        """The adapter's parameters, the only ones that train."""
        options = training.optimizer
        self.optimizer = build_optimizer(
            options.name,
            self.weights.slices(whole_tensors=OPTIMIZERS[options.name].whole_tensors),
            learning_rate=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            lora_plus_ratio=options.lora_plus_ratio,
        )
        self.average = None if training.ema_decay is None else self.weights.values.clone()
        """The exponential moving average of the weights, if the recipe keeps one."""
        self.skipped = torch.zeros(2, dtype=torch.int64, device=unet.device)
        """The steps skipped so far: in all, and one after the other up to now."""
        self.skipped_and_said = 0
        """The steps skipped that have been reported."""
        self.watch = GradientWatch(self.weights, training.adapter.dropout)
        self.tables = NoiseTables.of(schedulers[0], unet.device)
        self.predict: Callable[..., Any] = unet
        """The UNet's forward pass, compiled after :meth:`compile`."""
        self.recorded = Replayed(
            self._forward_backward, "The training step", enabled=training.cuda_graph
        )

    def accumulate(self, batch: Batch) -> Losses:
        """Add a batch's gradients and return its losses, which the next call may overwrite."""
        return self.recorded(**batch.tensors())

    def _forward_backward(self, **tensors: Tensor) -> Losses:
        batch = Batch(**tensors)
        self.dropout_keys.values = batch.dropout_keys
        noisy = add_noise(batch, self.schedulers[0])
        inputs = unet_inputs(self.stage, batch, noisy, self.schedulers, self.unet.dtype)
        rows = batch.preserved
        if rows is not None:  # first, so that its activations are gone before others are kept
            chosen = {name: tensor.index_select(0, rows) for name, tensor in inputs.items()}
            target = self.predict_as_base(chosen)
        prediction = self.predict(**inputs, return_dict=False)[0]
        losses = hybrid_loss(
            prediction,
            batch.pixels,
            batch.noise,
            noisy,
            batch.timesteps,
            self.tables,
            min_snr_gamma=self.training.min_snr_gamma,
        )
        if rows is not None:
            distance = preservation_loss(prediction.index_select(0, rows), target)
            losses = losses.with_preserved(rows, distance)
        ((losses.total * batch.weight).sum() / self.training.accumulation).backward()
        self.weights.collect()
        return replace(losses, total=losses.total.detach())

    @torch.no_grad()
    def predict_as_base(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict what the base does for a UNet's inputs, [k, 6, S, S].

        This pass is never compiled: a second compilation would take minutes, and save little of a
        pass without gradients over a part of the batch.
        """
        training = self.unet.training
        self.unet.eval()  # or the base's own dropout, if it has any, would change its prediction
        try:
            with without_adapter(self.unet):
                return self.unet(**inputs, return_dict=False)[0]
        finally:
            self.unet.train(training)

    def compile(self) -> None:
        """Have the UNet compiled at the next batch, which then takes minutes."""
        self.recorded.forget()
        self.predict = torch.compile(self.unet, dynamic=False)

    @torch.no_grad()
    def update(self) -> Tensor:
        """Take an optimizer step with the accumulated gradients, if that leaves all finite.

        A step whose gradient, or the weights after it, are not finite is skipped: weights, average
        and the optimizer's moments stay as they were. This is decided on the device, so that no
        step waits; only what the optimizer counts on the CPU, such as its steps, counts this one.

        Returns:
            The gradient's norm, on the device.
        """
        gradient, values = self.weights.gradient, self.weights.values
        self.watch.observe(gradient, self.optimizer.param_groups[0]["lr"])
        norm = gradient.norm()
        finite = norm.square().isfinite()  # and so is the square of each value, a second moment
        if self.training.optimizer.max_grad_norm is not None:
            gradient.mul_((self.training.optimizer.max_grad_norm / norm).clamp(max=1))
        # an optimizer's state that does not exist yet must not begin with NaN
        torch.where(finite, gradient, torch.zeros_like(norm), out=gradient)
        kept = [(tensor, tensor.clone()) for tensor in (values, *self._moments())]
        self.optimizer.step()
        gradient.zero_()
        finite &= torch.linalg.vector_norm(values, ord=torch.inf).isfinite()
        for tensor, before in kept:
            torch.where(finite, tensor, before, out=tensor)
        self.weights.publish()
        if self.average is not None and self.training.ema_decay is not None:
            # low at first, or a short run's average would be mostly its initial weights; as in
            # diffusers' EMAModel except for the first update
            decay = min(self.training.ema_decay, (1 + self.step) / (10 + self.step))
            moved = self.average.lerp(values, 1 - decay)
            torch.where(finite, moved, self.average, out=self.average)
        self.skipped += ~finite
        self.skipped[1] *= ~finite
        self.step += 1
        return norm

    def _moments(self) -> list[Tensor]:
        """List the tensors of the optimizer's state on the device of the weights.

        Those of a paged optimizer may be in main memory, and are left out: copying them would take
        longer than the step.
        """
        device = self.weights.values.device
        states = self.optimizer.state.values()
        tensors = (each for state in states for each in state.values())
        return [each for each in tensors if torch.is_tensor(each) and each.device == device]

    @contextmanager
    def final_weights(
        self, kept: Mapping[str, Tensor] | None = None
    ) -> Iterator[UNet2DConditionModel]:
        """Yield the UNet in evaluation mode, with the weights that an export would have now.

        Args:
            kept: weights that :meth:`copy_weights` copied, to yield the UNet with these instead.
        """
        self.recorded.forget()  # sampling needs its memory
        values = self.weights.values
        final = values if self.average is None else self.average
        if kept is not None:
            final = torch.zeros_like(values)
            for name, view in self.weights.views(final).items():
                view.copy_(kept[name])
        trained = values.clone()  # leaving a schedule-free average restores them only to rounding
        self.unet.eval()
        try:
            with (
                averaged_weights(self.training.optimizer.name, self.optimizer),
                self.weights.use(final),
            ):
                yield self.unet
        finally:
            values.copy_(trained)
            self.unet.train()

    def copy_weights(self) -> dict[str, Tensor]:
        """Copy the adapter's parameters, as the UNet has them now, to the CPU."""
        parameters = self.weights.parameters.items()
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters}

    def state(self) -> dict[str, Any]:
        """Return all that training has changed, as a tree of tensors and plain values."""
        views = self.weights.views
        return {
            "step": self.step,
            "parameters": views(self.weights.values),
            "average": None if self.average is None else views(self.average),
            "optimizer": self.optimizer.state_dict(),
            "gradients": self.watch.state(),
            "skipped": self.skipped,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same recipe."""
        self.step = state["step"]
        for flat, saved in ((self.weights.values, "parameters"), (self.average, "average")):
            if flat is not None:
                for name, view in self.weights.views(flat).items():
                    view.copy_(state[saved][name])
        self.weights.publish()
        self.optimizer.load_state_dict(state["optimizer"])
        self.watch.load_state(state["gradients"])
        if "skipped" in state:  # checkpoints of the same format have been written without
            self.skipped.copy_(state["skipped"])
            self.skipped_and_said = int(self.skipped[0])
