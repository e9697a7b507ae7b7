"""A frozen Linear with a LoRA as one operation: 8 matrix products, where PEFT's takes 16 kernels.

The module stays PEFT's own, with its names and parameters; only its forward pass changes, and only
where nothing but W x + b + s B A x is asked of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

from unets.frozen import FrozenLinear


class _Adapted(torch.autograd.Function):
    """W x + b + s B A x, with h = A x kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear
    ) -> Tensor:
        rows = inputs.flatten(0, -2)
        hidden = rows @ a.T
        result = F.linear(rows, layer.weight, layer.bias).addmm_(hidden, b.T, alpha=scaling)
        ctx.save_for_backward(rows, hidden, a, b)
        ctx.scaling, ctx.layer, ctx.shape = scaling, layer, inputs.shape
        return result.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        rows, hidden, a, b = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        of_hidden = gradient.new_empty(()).expand(hidden.shape)
        of_hidden = torch.addmm(of_hidden, gradient, b, beta=0, alpha=ctx.scaling)
        of_b = torch.addmm(
            gradient.new_empty(()).expand(b.shape), gradient.T, hidden, beta=0, alpha=ctx.scaling
        )
        of_inputs = None
        if ctx.needs_input_grad[0]:
            of_inputs = (gradient @ ctx.layer.weight).addmm_(of_hidden, a).view(ctx.shape)
        return of_inputs, of_hidden.T @ rows, of_b, None, None


class AdaptedLinear(Linear):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's LoRA of a frozen Linear."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (args or kwargs or self.merged or self.disable_adapters or self.lora_variant)
        if plain and len(active) == 1 and not torch.compiler.is_compiling():
            (name,) = active
            a, b = self.lora_A[name], self.lora_B[name]
            drops = self.training and not isinstance(self.lora_dropout[name], nn.Identity)
            if not drops and a.weight.dtype == inputs.dtype and b.bias is None:
                scaling = self.scaling[name]
                return _Adapted.apply(inputs, a.weight, b.weight, scaling, self.base_layer)
        return super().forward(inputs, *args, **kwargs)


def fuse_adapters(model: nn.Module) -> None:
    """Give the LoRAs of a model's frozen Linears their fused forward pass, in place."""
    for layer in model.modules():
        if type(layer) is Linear and isinstance(layer.base_layer, FrozenLinear):
            layer.__class__ = AdaptedLinear
