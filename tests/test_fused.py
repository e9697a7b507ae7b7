"""The fused norm against PyTorch's own modules; without a GPU in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unets.fused import norm_act_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(
    x: Tensor, norm: nn.GroupNorm, activation: str, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    hidden = norm(x.transpose(1, 2)).transpose(1, 2)
    if scale is not None:
        hidden = hidden * (1 + scale[:, None]) + shift[:, None]
    return {"identity": lambda z: z, "gelu": F.gelu, "silu": F.silu}[activation](hidden)


@pytest.mark.parametrize("activation", ["identity", "gelu", "silu"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 7, 88), (1, 400, 24)])
def test_result_and_gradients_are_those_of_the_plain_modules(activation, scaled, shape):
    torch.manual_seed(0)
    pictures, _, channels = shape
    norm = nn.GroupNorm(8, channels, eps=1e-5, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 5).requires_grad_()
    scale, shift = (
        torch.randn(2, pictures, channels, dtype=torch.float64).unbind() if scaled else (None, None)
    )
    wanted_inputs = [x] + ([scale.requires_grad_(), shift.requires_grad_()] if scaled else [])
    expected = reference(x, norm, activation, scale, shift)
    dy = torch.randn(shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, wanted_inputs, dy)

    def single(tensor: Tensor) -> Tensor:
        return tensor.detach().float().to(DEVICE)

    inputs = [single(t).requires_grad_() for t in wanted_inputs]
    result = norm_act_rows(
        inputs[0],
        single(norm.weight),
        single(norm.bias),
        *(inputs[1:] or (None, None)),
        8,
        1e-5,
        activation,
    )[0]
    found = torch.autograd.grad(result, inputs, single(dy))
    for mine, theirs in zip([result, *found], [expected, *wanted], strict=True):
        error = (mine.cpu().double() - theirs).norm() / theirs.norm()
        assert error < 2e-5


def test_operator_is_well_formed():
    x = torch.randn(2, 16, 32, device=DEVICE, requires_grad=True)
    weight, bias = torch.randn(2, 32, device=DEVICE)
    torch.library.opcheck(
        norm_act_rows,
        (x, weight, bias, None, None, 8, 1e-5, "gelu"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
