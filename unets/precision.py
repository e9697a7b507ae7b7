"""The precisions of a model's weights, by name; torch, slow to import, is imported only if used."""

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
"""The format in which a model's weights are kept."""

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
"""The precisions of weights that are not quantised."""


def dtype_of(precision: str) -> "torch.dtype":
    """Return the dtype of a precision's unquantised weights; bf16 for ``int8`` and ``nf4``."""
    import torch

    quantised = dict.fromkeys(("int8", "nf4"), torch.bfloat16)
    plain = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return (quantised | plain)[precision]


def automatic_precision(device: "torch.device") -> Precision:
    """Choose the precision that suits a device: fp32 on a CPU, where it is faster, else bf16."""
    return "fp32" if device.type == "cpu" else "bf16"


def compute_dtype(precision: str, device: "torch.device") -> "torch.dtype":
    """Return the dtype in which a UNet computes; a quantised one: bf16, or fp32 on a CPU."""
    if precision not in PRECISIONS and device.type == "cpu":
        return dtype_of("fp32")
    return dtype_of(precision)
