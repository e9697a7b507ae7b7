"""The memory that training a stage takes, estimated on any machine and without weights.

The stage's own step runs on tensors without values (:mod:`unets.tally`), so that the operations
counted are those that will run.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.base.estimates import PROMPT_TOKENS, drawing_inputs, safety_checker_bytes
from adapters.base.source import Source
from finetune.memory.timing import work_of
from finetune.recipe.schema import OutputPrior, Prior, Training
from finetune.run.trainee import Trainee
from finetune.step.inputs import Batch
from finetune.step.optimizers import OPTIMIZERS
from finetune.step.stages import Stage
from unets.loading import blank_unet
from unets.tally import META, Tally, reserved, tally_forward, total_bytes


@dataclass(frozen=True)
class Footprint:
    """The memory that training takes, in bytes by part, and the work of one batch."""

    weights: int
    """The frozen UNet."""
    adapter: int
    """The adapter's weights and gradient, and its average if one is kept."""
    optimizer: int
    """The optimizer's state."""
    copies: int
    """The weights and the optimizer's state as they were, while an update is not known to be
    finite."""
    activations: int
    """The peak of a forward and backward pass; kept in a CUDA graph's pool."""
    flops: float
    """Floating-point operations; as ``work``, the mean of an optimizer step's batches, which may
    preserve the base's output for different numbers of pictures."""
    work: float
    """A relative measure of the batch's time: its floating-point operations, plus those that could
    be done while memory is moved and kernels are started."""

    @property
    def resident(self) -> int:
        """Bytes resident throughout training."""
        return self.weights + self.adapter + self.optimizer

    @property
    def reserved(self) -> int:
        """Bytes that PyTorch reserves during training."""
        return reserved(self.resident + self.copies + self.activations)


@dataclass(frozen=True)
class Rehearsal:
    """A stage's training on tensors without values."""

    trainee: Trainee
    optimizer: str
    """The name of the recipe's optimizer."""
    low_res_px: int | None
    """The picture size of the stage below; ``None`` in Stage I."""
    guard_bytes: int
    """The bytes of the safety checker, which is loaded on the device while the stage samples."""
    prior: OutputPrior | None = None
    """The preservation of the base's output, if the recipe asks for it."""
    _drawn: dict[int, Tally] = field(default_factory=dict, init=False, repr=False)
    """The memory of a sampling step, by the number of pictures."""

    @classmethod
    def of(
        cls,
        stage: Stage,
        training: Training,
        sources: Mapping[int, Source],
        device: torch.device,
        prior: Prior | None = None,
    ) -> "Rehearsal":
        """Set a stage up as it would be on a device, which this machine need not have.

        Args:
            stage: the stage.
            training: the stage's section of a recipe.
            sources: the bases of the stage and of the stage below, by number.
            device: a GPU or a CPU.
            prior: the recipe's prior preservation.

        Raises:
            UserError: if the base's configuration is missing, or a target matches nothing.
        """
        source = sources[stage.number]
        # a stand-in: some optimizers cannot be built without a GPU, and footprint() counts the
        # state of the recipe's own from its algorithm's figure
        plain = training.optimizer.model_copy(update={"name": "adamw_8bit"})
        trainee = Trainee(
            stage,
            training.model_copy(update={"optimizer": plain}),
            blank_unet(source.unet_config, training.precision_on(device), device),
            tuple(source.scheduler(name) for name in stage.schedulers),
            seed=0,
        )
        below = sources[1].picture_size_px if stage.super_resolution else None
        guard = safety_checker_bytes(source, trainee.unet.dtype)
        preserving = prior if isinstance(prior, OutputPrior) else None
        return cls(trainee, training.optimizer.name, below, guard, preserving)

    def batch(self, batch_size: int, preserved: int = 0) -> Batch:
        """Make a batch of the stage's shapes, for some of whose rows the base predicts too."""
        unet, n = self.trainee.unet, batch_size
        picture = (n, 3, unet.config.sample_size, unet.config.sample_size)
        floats = {"pixels": picture, "noise": picture, "weight": (n,)}
        integers = {"timesteps": (n,), "dropout_keys": (n, 2)}
        if self.low_res_px is not None:
            floats |= {
                "low_res": (n, 3, self.low_res_px, self.low_res_px),
                "low_res_noise": picture,
            }
            integers |= {"noise_level": (n,)}
        if preserved:
            integers |= {"preserved": (preserved,)}
        text = (n, PROMPT_TOKENS, unet.config.encoder_hid_dim)
        return Batch(
            **{name: torch.empty(shape, device=META) for name, shape in floats.items()},
            **{n: torch.empty(s, dtype=torch.int64, device=META) for n, s in integers.items()},
            prompt_embeds=torch.empty(text, dtype=unet.dtype, device=META),
        )

    def footprint(
        self, batch_size: int | None = None, accumulation: int | None = None
    ) -> Footprint:
        """Estimate the footprint of training, with the recipe's batches or others."""
        training = self.trainee.training
        flat, average = self.trainee.weights, self.trainee.average
        size = batch_size or training.batch_size
        counts = self.preserved_counts(size, accumulation or training.accumulation)
        vectors = [flat.values, flat.gradient, flat.working, flat.working_gradient]
        adapter = vectors if average is None else [*vectors, average]
        state = OPTIMIZERS[self.optimizer].state_bytes(flat.slices(whole_tensors=False))
        tallies = {}
        for preserved in counts:
            batch = self.batch(size, preserved)
            with Tally([*self._weights(), *adapter, *batch.tensors().values()]) as tally:
                self.trainee.accumulate(batch)
            tallies[preserved] = tally

        def mean(figure: Callable[[Tally], float]) -> float:
            return sum(figure(tallies[each]) * n for each, n in counts.items()) / counts.total()

        return Footprint(
            weights=self.weights_bytes,
            adapter=total_bytes(adapter),
            optimizer=state,
            copies=total_bytes([flat.values]) + state,
            activations=max(tally.peak_bytes for tally in tallies.values()),
            flops=mean(lambda tally: tally.flops),
            work=mean(work_of),
        )

    def preserved_counts(self, batch_size: int, accumulation: int) -> Counter[int]:
        """Count a step's batches by the number of pictures that each preserves, on one GPU."""
        if self.prior is None:
            return Counter({0: accumulation})
        least, more = divmod(self.prior.count_in(batch_size * accumulation), accumulation)
        # they differ by at most one (finetune.data.batches); + drops a number that no batch has
        return +Counter({least: accumulation - more, least + 1: more})

    @property
    def weights_bytes(self) -> int:
        """The bytes of the frozen UNet."""
        return total_bytes(self._weights())

    def drawing_bytes(self, pictures: int) -> int:
        """Estimate the most bytes held while some number of pictures is sampled at once."""
        return self._draw(pictures).peak_bytes + self.guard_bytes

    def drawing_work(self, pictures: int, at_once: int, steps: int) -> float:
        """Return a relative measure of the time that some pictures are sampled in, with guidance.

        Args:
            pictures: their number.
            at_once: the number that is sampled at a time.
            steps: the sampling steps.
        """
        whole, rest = divmod(pictures, at_once)
        batches = whole * work_of(self._draw(at_once)) + (work_of(self._draw(rest)) if rest else 0)
        return steps * batches

    def _draw(self, pictures: int) -> Tally:
        """Count what a sampling step takes."""
        if pictures not in self._drawn:
            with self.trainee.final_weights() as unet:
                inputs = drawing_inputs(unet, pictures)
                self._drawn[pictures] = tally_forward(unet, inputs, unet.state_dict().values())
        return self._drawn[pictures]

    def _weights(self) -> list[Tensor]:
        adapter = set(self.trainee.weights.parameters)
        state = self.trainee.unet.state_dict()
        return [tensor for name, tensor in state.items() if name not in adapter]
