"""The frame of every section, and the types that fields of several sections have."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from adapters.texts import find_flaw
from unets.precision import Precision, automatic_precision

if TYPE_CHECKING:  # so that mistakes are reported without this slow import
    import torch


class Section(BaseModel):
    """A part of a recipe: frozen, strict about names and types, and without empty texts."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @field_validator("*")
    @classmethod
    def _check_texts(cls, value: Any) -> Any:
        several = isinstance(value, tuple)
        for place, text in enumerate(value if several else (value,), start=1):
            if isinstance(text, str) and (flaw := find_flaw(text)):
                raise ValueError(f"text {place} {flaw}" if several else flaw)
        return value


def _check_ascending(levels: tuple[int, int]) -> tuple[int, int]:
    if levels[0] > levels[1]:
        raise ValueError(f"must be [low, high] with low <= high (got {list(levels)})")
    return levels


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Levels = Annotated[
    tuple[NonNegative, NonNegative], Field(strict=False), AfterValidator(_check_ascending)
]
ChosenPrecision = Literal["auto", "fp32", "bf16", "int8", "nf4"]


def resolve_precision(precision: ChosenPrecision, device: "torch.device") -> Precision:
    """Return the precision on a device that ``auto`` stands for, and any other as it is."""
    return automatic_precision(device) if precision == "auto" else precision
