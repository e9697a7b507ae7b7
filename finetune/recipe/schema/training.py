"""The ``stage_1`` and ``stage_2`` sections: the training of a stage."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adapters.weights.kinds import AdapterSpec
from finetune.recipe.schema.fields import (
    ChosenPrecision,
    Levels,
    Positive,
    PositiveFactor,
    Section,
    resolve_precision,
)
from finetune.recipe.schema.optimizer import Optimizer
from finetune.recipe.schema.timesteps import Timesteps
from unets.precision import Precision

if TYPE_CHECKING:  # so that mistakes are reported without this slow import
    import torch


class Training(Section):
    """The training of one stage: adapter, optimizer, length and precision."""

    steps: Annotated[int, Field(ge=1, le=10**8)]
    """The number of optimizer steps."""
    batch_size: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Pictures at a time on each GPU, those of the prior included."""
    accumulation: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Batches whose gradients are averaged into one optimizer step: two batches of 2 pictures train
    the same as one of 4."""
    adapter: AdapterSpec = AdapterSpec()
    """The adapter: kind, rank, targets."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and its schedule."""
    precision: ChosenPrecision = "auto"
    """The precision of the frozen UNet's weights; ``auto``: bf16 on a GPU, fp32 on a CPU. An
    adapter's weights and optimizer are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cuda_graph: bool = True
    """Record the step as one CUDA graph, on a GPU, and replay it."""
    compile: bool = False
    """Compile the UNet, on a GPU: steps take about 3 % less time, but the first takes minutes."""
    timesteps: Timesteps = Timesteps()
    """The distribution of each picture's timestep."""
    noise_level: Levels | None = None
    """Stage II only: the range from which each picture's augmentation level is drawn, inclusive;
    ``None``: all levels of the model's schedule."""
    min_snr_gamma: PositiveFactor | None = None
    """Gamma of the Min-SNR weighting of the MSE term; ``None``: no weighting. It does not apply to
    pictures preserved by ``prior.kind: output``, whose loss has no such term."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The decay of an exponential moving average of the adapter, which is then exported; ``None``:
    no average. The decay after t steps is at most (1 + t) / (10 + t), so that the average of a
    short run holds little of the initial weights."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """The number of newest checkpoints to keep."""

    def precision_on(self, device: "torch.device") -> Precision:
        """Return the precision of the frozen UNet on a device."""
        return resolve_precision(self.precision, device)
