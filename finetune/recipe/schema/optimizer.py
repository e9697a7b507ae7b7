"""The ``optimizer`` section of a stage."""

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from adapters.errors import name_in
from finetune.recipe.schema.fields import LARGEST, Decay, NonNegative, PositiveFactor, Section
from finetune.step.optimizers import OPTIMIZERS
from finetune.step.schedules import SCHEDULES

LEAST_SCALE = 0.1
"""The least sensible learning rate of an optimizer that finds its own step size."""


class Optimizer(Section):
    """The optimizer of the adapter's parameters."""

    name: Annotated[str, name_in(OPTIMIZERS)] = "adamw_8bit"
    """One of the names in ``finetune.step.optimizers.OPTIMIZERS``."""
    learning_rate: PositiveFactor = 1e-4
    """The peak learning rate; 1 for ``prodigy``, which finds its own scale."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] | None = None
    """Decay rates of the first and second moments; ``None``: the optimizer's own."""
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST)] = 0.01
    """Decoupled weight decay."""
    lora_plus_ratio: Annotated[float, Field(ge=1, le=LARGEST)] = 1.0
    """LoRA+: the ratio of the B matrices' learning rate to the A matrices'."""
    schedule: Annotated[str, name_in(SCHEDULES)] = "constant"
    """One of the names in ``finetune.step.schedules.SCHEDULES``."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises from zero, fewer than the stage's ``steps``;
    ``one_cycle`` rises from 1/25 of the peak, and over 0.3 of the steps if this is 0."""
    max_grad_norm: PositiveFactor | None = 1.0
    """Clip the gradient to this norm; ``None``: never."""

    @field_validator("learning_rate", "betas", "lora_plus_ratio")
    @classmethod
    def _check_optimizer_takes(cls, value: Any, info: ValidationInfo) -> Any:
        name, field = info.data.get("name"), info.field_name
        if name is None:  # the name's own mistake is reported
            return value
        algorithm = OPTIMIZERS[name]
        if field == "betas" and value is not None and algorithm.betas is None:
            raise ValueError(f"{name} has no betas: leave them out")
        if algorithm.finds_scale and field == "learning_rate" and value < LEAST_SCALE:
            raise ValueError(
                f"{name} finds its own step size, which the learning rate multiplies: give 1, or"
                f" at least {LEAST_SCALE} (got {value})"
            )
        if algorithm.finds_scale and field == "lora_plus_ratio" and value != 1:
            raise ValueError(
                f"{name} takes one learning rate for all parameters: leave the ratio at 1"
                f" (got {value})"
            )
        return value
