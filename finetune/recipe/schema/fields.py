"""The frame of every section, and the types that fields of several sections have."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from adapters.arguments import expand_home
from adapters.errors import UserError
from adapters.texts import find_flaw
from unets.precision import Precision, automatic_precision

if TYPE_CHECKING:  # so that mistakes are reported without this slow import
    import torch


class Section(BaseModel):
    """A part of a recipe: frozen, strict about names and types, without empty or endless texts."""

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


def _check_home(path: str) -> str:
    """Raise a ValueError if a path begins with the home folder of someone who is not a user."""
    try:
        expand_home(path)
    except UserError as error:
        raise ValueError(str(error)) from None
    return path


def _check_ascending(levels: tuple[int, int]) -> tuple[int, int]:
    if levels[0] > levels[1]:
        raise ValueError(f"must be [low, high] with low <= high (got {list(levels)})")
    return levels


MOST = 10**9
"""The most of whatever is counted, unless a field says less: nothing takes longer to count."""

LARGEST = 1e30
"""The largest factor, far within float32."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""The form of the names of runs and sweeps, which are those of their folders."""

LONGEST_NAME = 100
"""The most letters of such a name: file systems take 255, with what is put behind it."""

Positive = Annotated[int, Field(ge=1, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
PositiveFactor = Annotated[float, Field(gt=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Levels = Annotated[
    tuple[NonNegative, NonNegative], Field(strict=False), AfterValidator(_check_ascending)
]
PathText = Annotated[str, AfterValidator(_check_home)]
"""A path or hub name, as it was written; its ``~`` is expanded where it is used."""

ChosenPrecision = Literal["auto", "fp32", "bf16", "int8", "nf4"]


def resolve_precision(precision: ChosenPrecision, device: "torch.device") -> Precision:
    """Return the precision on a device that ``auto`` stands for, and any other as it is."""
    return automatic_precision(device) if precision == "auto" else precision
