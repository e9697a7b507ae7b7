"""Similarities, against sums over pairs in float64, and the Fréchet distance, against theory."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.evaluation import metrics
from finetune.evaluation.metrics import (
    clip_i,
    clip_i_ceiling,
    clip_t,
    diversities,
    faithfulness,
    frechet_distance,
    likeness,
    likeness_among,
    nearest,
    nearest_among,
)


def units(count: int, seed: int, width: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=draw), dim=-1)


def cosines(one: Tensor, other: Tensor) -> NDArray[np.float64]:
    pairs = [[np.dot(a, b) for b in other.double().numpy()] for a in one.double().numpy()]
    return np.array(pairs)


def test_scores_are_cosines_of_pairs() -> None:
    generated, real, texts = units(3, 0), units(5, 1), units(3, 2)
    pairs = cosines(generated, real)
    np.testing.assert_allclose(likeness(generated, real), pairs.mean(1), rtol=1e-12)
    assert clip_i(generated, real) == pytest.approx(pairs.mean(), rel=1e-12)
    own = np.diag(cosines(generated, texts))
    np.testing.assert_allclose(faithfulness(generated, texts), own, rtol=1e-12)
    assert clip_t(generated, texts) == pytest.approx(own.mean(), rel=1e-12)
    similarity, row = nearest(generated, real)
    np.testing.assert_allclose(similarity, pairs.max(1), rtol=1e-12)
    assert row.tolist() == pairs.argmax(1).tolist()


def test_pictures_are_not_compared_with_themselves() -> None:
    real = units(5, 1)
    pairs = cosines(real, real)
    others = [[pairs[i, j] for j in range(5) if j != i] for i in range(5)]
    np.testing.assert_allclose(likeness_among(real), np.mean(others, axis=1), rtol=1e-12)
    np.testing.assert_allclose(nearest_among(real), np.max(others, axis=1), rtol=1e-12)
    assert clip_i_ceiling(real) == pytest.approx(np.mean(others), rel=1e-12)
    assert float(diversities(real).mean()) == pytest.approx(1 - np.mean(others), rel=1e-12)
    assert clip_i_ceiling(real[:1]) is None


def test_many_pictures_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = units(5, 1)
    whole = nearest_among(real)
    monkeypatch.setattr(metrics, "ROWS", 2)
    assert torch.equal(nearest_among(real), whole)


def test_equal_pictures_have_no_diversity() -> None:
    assert diversities(units(1, 0).expand(3, -1)).tolist() == pytest.approx([0] * 3, abs=1e-6)


def test_the_frechet_distance_equals_the_formula_with_a_root_of_a_matrix() -> None:
    one, other = units(40, 0), units(30, 1) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    a, b = (np.cov(vectors.double().numpy(), rowvar=False) for vectors in (one, other))
    values, vectors = np.linalg.eigh(a)
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    root = np.sqrt(np.linalg.eigvalsh(half @ b @ half).clip(0)).sum()
    means = one.double().mean(0).numpy() - other.double().mean(0).numpy()
    wanted = means @ means + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


def test_the_frechet_distance_of_two_normal_distributions_is_the_known_one() -> None:
    """Of N(m1, s1²) and N(m2, s2²) in each of two dimensions: |m1 - m2|² + 2 (s1 - s2)²."""
    draw = np.random.default_rng(0)
    one = torch.from_numpy(draw.normal(0, 1, (20_000, 2)))
    other = torch.from_numpy(draw.normal(3, 2, (1_000, 2)))
    assert frechet_distance(one, other) == pytest.approx(2 * 9 + 2 * 1, rel=0.03)


def test_the_frechet_distance_needs_fewer_vectors_than_dimensions() -> None:
    one, other = units(3, 0, width=64), units(4, 1, width=64)
    assert frechet_distance(one, other) > 0
    assert frechet_distance(one, one.flip(0)) == pytest.approx(0, abs=1e-12)
