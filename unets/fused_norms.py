"""The operations around IF's convolutions, in few passes over memory.

Group norm, scale and shift, and activation take four passes, and PyTorch's group norm also copies
channels_last tensors to another layout and back; a convolution's bias and a residual take two more.
On a GPU, Triton operators do the former in two passes and the latter in one, compute in float32,
and keep only their input for the backward pass. Elsewhere PyTorch's own operators run, in the order
in which diffusers applies them.
"""

import importlib.util
from threading import Thread

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"identity": lambda x: x, "gelu": F.gelu, "silu": F.silu}
"""The activations that the fused operator knows."""

HAS_TRITON = importlib.util.find_spec("triton") is not None


def compile_ahead(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    """Compile the operators for a GPU in the background, while a model is being loaded."""
    if HAS_TRITON and device.type == "cuda":
        for name, scaled in ((activation, False), (activation, True), ("identity", False)):
            Thread(target=_try_out, args=(device, dtype, name, scaled), daemon=True).start()


def _try_out(device: torch.device, dtype: torch.dtype, activation: str, scaled: bool) -> None:
    channels = 64
    # on a separate stream, so that loading on the current one does not wait
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros(1, channels, 4, 4, device=device, dtype=dtype, requires_grad=True)
        vector = torch.zeros(channels, device=device, dtype=dtype)
        norm = nn.GroupNorm(1, channels, device=device, dtype=dtype).requires_grad_(False)
        scale, shift = torch.zeros(1, 2 * channels, device=device, dtype=dtype).chunk(2, dim=1)
        settings = {"scale": scale, "shift": shift, "offset": vector} if scaled else {}
        result = norm_act(x, norm, activation, **settings)
        add(x, result, vector, 1.0).sum().backward()


def _has_kernels(x: Tensor) -> bool:
    """Tell whether the Triton operators take a tensor; on meta they give a GPU's shapes."""
    return HAS_TRITON and x.device.type in ("cuda", "meta")


def norm_act(
    inputs: Tensor,
    norm: nn.GroupNorm,
    activation: str = "identity",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    offset: Tensor | None = None,
) -> Tensor:
    """Compute act(norm(x + offset) * (1 + scale) + shift), with a frozen norm.

    Inputs x are [B, C, ...], scale and shift [B, C], the frozen offset [C]; ``None``: 0.
    """
    if _has_kernels(inputs):
        from unets.triton_kernels import norm_act_rows

        rows = inputs.movedim(1, -1)
        result = norm_act_rows(
            rows.flatten(1, -2),
            norm.weight,
            norm.bias,
            offset,
            scale,
            shift,
            norm.num_groups,
            norm.eps,
            activation,
        )[0]
        return result.view(rows.shape).movedim(-1, 1)
    places = (...,) + (None,) * (inputs.dim() - 2)
    hidden = inputs if offset is None else inputs + offset[places]
    hidden = F.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if scale is not None and shift is not None:
        hidden = hidden * (1 + scale[places]) + shift[places]
    return ACTIVATIONS[activation](hidden)


def add(x: Tensor, hidden: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    """Compute (x + hidden + bias) * factor; x and hidden [B, C, H, W], bias [C], frozen."""
    if bias is not None and _has_kernels(x):
        from unets.triton_kernels import add_rows

        rows, hidden = x.movedim(1, -1), hidden.movedim(1, -1)
        total = add_rows(rows.flatten(1, -2), hidden.flatten(1, -2), bias, factor)
        return total.view(rows.shape).movedim(-1, 1)
    total = x + (hidden if bias is None else hidden + bias[:, None, None])
    return total if factor == 1 else total * factor
