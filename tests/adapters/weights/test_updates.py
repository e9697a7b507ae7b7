"""The record of a low-rank update: what is measured of it is that of the matrix B A."""

import torch

from adapters.weights.approximation import Approximation
from adapters.weights.updates import LowRank


def low_rank(seed: int, rank: int, scaling: float) -> LowRank:
    """The update of a convolution [6, 4, 3, 3], in float64."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(6, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, 4, 3, 3, generator=generator, dtype=torch.float64)
    return LowRank(b, a, scaling)


def test_inner_products_are_those_of_the_matrices() -> None:
    one, other = low_rank(0, 2, 0.5), low_rank(1, 3, -2.0)
    assert one.shape == (6, 4, 3, 3)
    torch.testing.assert_close(one.inner(other), (one.product() * other.product()).sum())


def test_a_product_and_its_matrix_have_the_same_approximation() -> None:
    update = low_rank(0, 3, 0.5)
    found = []
    for given in (update, update.product().view(update.shape)):
        approximation = Approximation(2)
        approximation.add_update("conv", given)
        a, b = (approximation.state[f"conv.lora_{side}.weight"] for side in "AB")
        assert (a.shape, b.shape) == ((2, 4, 3, 3), (6, 2, 1, 1))
        found.append((b.flatten(1) @ a.flatten(1), approximation.error))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert abs(found[0][1] - found[1][1]) < 1e-6
