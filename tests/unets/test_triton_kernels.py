"""The Triton operators against PyTorch's own; without a GPU in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unets.triton_kernels import add_rows, norm_act_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(
    x: Tensor, norm: nn.GroupNorm, activation: str, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    hidden = norm(x.transpose(1, 2)).transpose(1, 2)
    if scale is not None:
        hidden = hidden * (1 + scale[:, None]) + shift[:, None]
    return {"identity": lambda z: z, "gelu": F.gelu, "silu": F.silu}[activation](hidden)


@pytest.mark.parametrize("activation", ["identity", "gelu", "silu"])
@pytest.mark.parametrize(("scaled", "with_offset"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 7, 88), (1, 400, 24)])
def test_result_and_gradients_are_those_of_the_plain_modules(
    activation, scaled, with_offset, shape
):
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
    offset = torch.randn(channels, dtype=torch.float64) * 4 if with_offset else None
    expected = reference(x + offset if with_offset else x, norm, activation, scale, shift)
    dy = torch.randn(shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, wanted_inputs, dy)

    def single(tensor: Tensor) -> Tensor:
        return tensor.detach().float().to(DEVICE)

    inputs = [single(t).requires_grad_() for t in wanted_inputs]
    result = norm_act_rows(
        inputs[0],
        single(norm.weight),
        single(norm.bias),
        single(offset) if with_offset else None,
        *(inputs[1:] or (None, None)),
        8,
        1e-5,
        activation,
    )[0]
    found = torch.autograd.grad(result, inputs, single(dy))
    for mine, theirs in zip([result, *found], [expected, *wanted], strict=True):
        error = (mine.cpu().double() - theirs).norm() / theirs.norm()
        assert error < 2e-5


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_residual_and_its_gradients_are_those_of_plain_additions(factor):
    torch.manual_seed(0)
    x, hidden = (torch.randn(2, 3, 700, device=DEVICE, requires_grad=True) for _ in range(2))
    bias = torch.randn(700, device=DEVICE)
    result, plain = add_rows(x, hidden, bias, factor), (x + (hidden + bias)) * factor
    assert torch.allclose(result, plain, atol=1e-6)
    dy = torch.randn_like(result)
    for mine, theirs in zip(
        *(torch.autograd.grad(y, [x, hidden], dy) for y in (result, plain)), strict=True
    ):
        assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("with_offset", [False, True])
def test_operators_are_well_formed(with_offset):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    x = torch.randn(2, 16, 32, device=DEVICE, requires_grad=True)
    weight, bias, offset = torch.randn(3, 32, device=DEVICE)
    arguments = (x, weight, bias, offset if with_offset else None, None, None, 8, 1e-5, "gelu")
    torch.library.opcheck(norm_act_rows, arguments, test_utils=checks)
    torch.library.opcheck(add_rows, (x, x.detach().clone(), bias, 1.0), test_utils=checks)
