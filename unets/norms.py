"""Group norm, scale and shift, and activation in one: act(norm(x) * (1 + scale) + shift).

Around IF's convolutions these are four passes over memory, and in PyTorch a group norm also turns
channels_last tensors around and back. On a GPU one Triton operator does it in two passes, keeps
nothing but its input for the backward pass, and computes in float32. Elsewhere, and while
compiling, PyTorch's own operators do it, in the order in which diffusers applies them.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"identity": lambda x: x, "gelu": F.gelu, "silu": F.silu}
"""The activations that the fused operator knows."""

HAS_TRITON = importlib.util.find_spec("triton") is not None


def norm_act(
    inputs: Tensor,
    norm: nn.GroupNorm,
    activation: str = "identity",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """act(norm(x) * (1 + scale) + shift).

    Args:
        inputs: x, [B, C, ...].
        norm: a frozen group norm.
        activation: one of :data:`ACTIVATIONS`.
        scale: [B, C]; ``None``: 0.
        shift: [B, C]; ``None``: 0.
    """
    if HAS_TRITON and inputs.device.type in ("cuda", "meta") and not torch.compiler.is_compiling():
        from unets.fused import norm_act_rows

        rows = inputs.movedim(1, -1)
        result = norm_act_rows(
            rows.flatten(1, -2),
            norm.weight,
            norm.bias,
            scale,
            shift,
            norm.num_groups,
            norm.eps,
            activation,
        )[0]
        return result.view(rows.shape).movedim(-1, 1)
    hidden = norm(inputs)
    if scale is not None and shift is not None:
        places = (...,) + (None,) * (inputs.dim() - 2)
        hidden = hidden * (1 + scale[places]) + shift[places]
    return ACTIVATIONS[activation](hidden)
