"""LyCORIS' algorithms, without its package: the change that a module's tensors make to its weight.

Each formula is that of the library's own forward pass (github.com/KohakuBlueleaf/LyCORIS, 4.1) at
a multiplier of 1. W is a weight [out, in, ...], r a rank; ``scale`` is alpha / r. PEFT's LoHa and
LoKr are the same formulas.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]
"""The tensors of a module by their names without the module's."""

WHOLE_MATRICES = {"lokr_w1", "lokr_w2"}
"""The tensors of a LoKr without factors, to which neither rank nor alpha applies."""


@dataclass
class LycorisConfig:
    """Settings of a LyCORIS file, gathered from its tensors, as such files have no others."""

    kind: str
    """Its algorithms, joined by ``+``."""
    r: int
    """The most common rank; 0: the algorithm has none."""
    alpha: float
    """The most common alpha (for OFT: its constraint)."""
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str]
    base_model_name_or_path: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in JSON's types."""
        return asdict(self)


class Algorithm(NamedTuple):
    """An algorithm: the tensors it needs, its formula, and its rank from the tensors."""

    kind: str
    needs: Sequence[Sequence[Sequence[str]]]
    """Needs, each with its alternatives: all tensors of one alternative have to be there."""
    change: Callable[[Tensors, Tensor, float], Tensor]
    """Computes what is added to W, [out, in, ...] or [out, in * ...], from the tensors, W and
    ``scale`` (for OFT: alpha itself)."""
    rank: Callable[[Tensors], int] = lambda tensors: 0
    """Returns the rank; 0: the algorithm has none."""
    alpha: bool = False
    """Its files always have an alpha, which scales the change."""


def _rank_of_lokr(t: Tensors) -> int:
    """Return the rank of the factors; for whole matrices, the largest that they can have.

    The file does not keep the rank that whole matrices were trained with, so ``rs_lora`` is
    lost on them, as it is when the library itself loads the file.
    """
    factors = [t[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in t]
    if factors:
        return len(factors[0])
    return min(t["lokr_w1"].shape) * min(t["lokr_w2"].flatten(1).shape)


def _lora(t: Tensors, weight: Tensor, scale: float) -> Tensor:
    return t["lora_B.weight"].flatten(1) @ t["lora_A.weight"].flatten(1) * scale


def _loha(t: Tensors, weight: Tensor, scale: float) -> Tensor:
    """Compute (w1_a w1_b) ⊙ (w2_a w2_b), equation 2 of arXiv 2108.06098."""
    one, two = (
        _product(t.get(f"hada_t{side}"), t[f"hada_w{side}_a"], t[f"hada_w{side}_b"])
        for side in (1, 2)
    )
    return one * two * scale


def _lokr(t: Tensors, weight: Tensor, scale: float) -> Tensor:
    """Compute w1 ⊗ w2, the Kronecker product of arXiv 2212.10650."""
    one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    two = (
        t["lokr_w2"]
        if "lokr_w2" in t
        else _product(t.get("lokr_t2"), t["lokr_w2_a"], t["lokr_w2_b"])
    )
    one = one.view(*one.shape, *[1] * (two.ndim - 2))
    return torch.kron(one, two.contiguous()) * scale


def _product(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Compute A B or, with a core [r, r, ...], its Tucker product with A [r, out] and B [r, in]."""
    return a @ b if core is None else torch.einsum("ij...,ip,jq->pq...", core, a, b)


def _glora(t: Tensors, weight: Tensor, scale: float) -> Tensor:
    """Compute W A + B, with the low-rank A = a1 a2 and B = b1 b2."""
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    return (torch.einsum("oi...,ij->oj...", weight, a1 @ a2).flatten(1) + b1 @ b2) * scale


def _ia3(t: Tensors, weight: Tensor, scale: float) -> Tensor:
    if t["ia3_scale"].numel() not in weight.shape[:2]:
        raise RuntimeError("neither one value for each input nor one for each output")
    return weight * t["ia3_scale"]


def _oft(t: Tensors, weight: Tensor, scale: float) -> Tensor:
    """Compute (R - I) W with R of orthogonal blocks [number, size, size], applied transposed."""
    blocks = _rotations(t["oft_blocks"], scale * len(weight))
    rows = weight.unflatten(0, blocks.shape[:2])
    turned = torch.einsum("knm,kn...->km...", blocks, rows).flatten(0, 1)
    return _rescaled(t, turned) - weight


def _boft(t: Tensors, weight: Tensor, scale: float) -> Tensor:
    """Compute (R - I) W, R a butterfly of blocks [stages, number, size, size], arXiv 2311.06243."""
    turned = weight
    for stage, blocks in enumerate(_rotations(t["oft_blocks"], scale * len(weight))):
        apart = 2**stage * (blocks.shape[-1] // 2)  # the distance between rows that a stage mixes
        rows = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2)
        rows = torch.einsum("bij,bj...->bi...", blocks, rows.unflatten(0, blocks.shape[:2]))
        turned = rows.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return _rescaled(t, turned) - weight


def _rotations(blocks: Tensor, constraint: float) -> Tensor:
    """Compute orthogonal blocks [..., size, size], by Cayley's transform of a skew-symmetric part.

    The constraint is the largest norm of that part; 0: no limit.
    """
    skew = blocks - blocks.mT
    if constraint:
        skew = skew * (constraint / (skew.norm() + 1e-8)).clamp(max=1)
    eye = torch.eye(blocks.shape[-1], device=blocks.device)
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


def _rescaled(t: Tensors, weight: Tensor) -> Tensor:
    return weight * t["rescale"] if "rescale" in t else weight


ALGORITHMS: Mapping[str, Algorithm] = {
    "lora_": Algorithm(
        "lora", [[["lora_A.weight", "lora_B.weight"]]], _lora, lambda t: len(t["lora_A.weight"])
    ),
    "hada_": Algorithm(
        "loha",
        [
            [["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]],
            [[], ["hada_t1", "hada_t2"]],  # cores on a convolution: both or none
        ],
        _loha,
        lambda t: len(t["hada_w1_b"]),
        alpha=True,
    ),
    "lokr_": Algorithm(
        "lokr",
        [[[w], [f"{w}_a", f"{w}_b"]] for w in ("lokr_w1", "lokr_w2")],
        _lokr,
        _rank_of_lokr,
        alpha=True,
    ),
    "a1": Algorithm(
        "glora",
        [[["a1.weight", "a2.weight", "b1.weight", "b2.weight"]]],
        _glora,
        lambda t: len(t["a2.weight"]),
        alpha=True,
    ),
    "diff": Algorithm("full", [[["diff"]]], lambda t, weight, scale: t["diff"]),
    "ia3_scale": Algorithm("ia3", [[["ia3_scale"]]], _ia3),
    "oft_blocks": Algorithm("diag-oft", [[["oft_blocks"]]], _oft),
    "boft": Algorithm("boft", [[["oft_blocks"]]], _boft),
}
"""The algorithms, each by a prefix that only its tensors' names have (``boft``: known by shape)."""


def algorithm_of(tensors: Tensors) -> Algorithm | None:
    """Return the algorithm of a module's tensors; ``None``: none of these (PEFT's own OFT)."""
    if "oft_blocks" in tensors and tensors["oft_blocks"].ndim == 4:
        return ALGORITHMS["boft"]
    marks = (mark for mark in ALGORITHMS for name in tensors if name.startswith(mark))
    return next((ALGORITHMS[mark] for mark in marks), None)


def missing_tensors(tensors: Tensors) -> list[str]:
    """List the names of the tensors that a module's algorithm needs and that are not there."""
    algorithm, missing = algorithm_of(tensors), list[str]()
    for alternatives in algorithm.needs if algorithm else ():
        begun = (names for names in alternatives if not tensors.keys().isdisjoint(names))
        missing += [name for name in next(begun, alternatives[0]) if name not in tensors]
    return missing


def check_shapes(tensors: Tensors) -> None:
    """Raise a RuntimeError if tensors have fewer than two dimensions, or a LoRA two ranks."""
    algorithm = algorithm_of(tensors)
    needs = algorithm.needs if algorithm else ()
    matrices = {"dora_scale", *(name for need in needs for names in need for name in names)}
    if any(tensors[name].ndim < 2 for name in tensors.keys() & matrices):
        raise RuntimeError("a tensor of fewer than two dimensions")
    if algorithm is ALGORITHMS["lora_"]:
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if len(a) != b.shape[1]:
            raise RuntimeError(f"ranks of {len(a)} and {b.shape[1]}")


def simplify(tensors: Tensors) -> dict[str, Tensor]:
    """Rewrite a module's tensors as equivalent ones of :data:`ALGORITHMS`.

    The core of a LoRA (``lora_mid``) is multiplied into its A, and IA3's vector gets a shape that
    can multiply a weight.

    Raises:
        RuntimeError: if a core does not fit its factors, or ``on_input`` is not 0 or 1.
    """
    own = dict(tensors)
    if {"lora_mid.weight", "lora_A.weight"} <= own.keys():
        core, a = own.pop("lora_mid.weight").float(), own["lora_A.weight"].float()
        own["lora_A.weight"] = torch.einsum("ij...,jq->iq...", core, a.flatten(1))
    if {"on_input", "weight"} <= own.keys():
        vector, on_input = own.pop("weight"), int(switch := own.pop("on_input"))
        if switch not in (0, 1):
            raise RuntimeError(f"on_input must be 0 or 1 (got {switch.item()})")
        shape = [1] * max(vector.ndim, 2)
        shape[on_input] = -1
        own["ia3_scale"] = vector.reshape(shape)
    return own


def with_peft_magnitude(tensors: Tensors) -> dict[str, Tensor]:
    """Rename the DoRA magnitude of a LoRA as PEFT does, if it has one value per output."""
    own = dict(tensors)
    if {"dora_scale", "lora_A.weight", "lora_B.weight"} <= own.keys():
        scale, outputs = own["dora_scale"], len(own["lora_B.weight"])
        if scale.numel() == len(scale) == outputs:
            shape = (1, -1, 1, 1) if own["lora_A.weight"].ndim == 4 else (-1,)
            own["lora_magnitude_vector"] = own.pop("dora_scale").reshape(shape)
    return own


def weight_change(tensors: Tensors, weight: Tensor, scale: float) -> Tensor:
    """Compute what the tensors of a module add to its weight.

    Args:
        tensors: all those of one of :data:`ALGORITHMS`; with ``dora_scale``, DoRA's magnitude, over
            outputs [out, 1, ...] or inputs [1, in, ...].
        weight: the base's own W, [out, in, ...]; the result is on its device.
        scale: alpha / rank; for OFT alpha; unused by other algorithms without a rank.

    Returns:
        [out, in, ...] in float32.

    Raises:
        RuntimeError: if the shapes do not fit the weight.
    """
    own = {name: t.to(weight.device, torch.float32) for name, t in tensors.items()}
    algorithm, base = algorithm_of(own), weight.to(torch.float32)
    assert algorithm is not None
    change = algorithm.change(own, base, scale)
    if change.flatten(1).shape != weight.flatten(1).shape:
        raise RuntimeError(f"a change of {list(change.shape)} for {list(weight.shape)}")
    change = change.reshape(weight.shape)
    if "dora_scale" not in own:
        return change
    merged, magnitude = base + change, own["dora_scale"]
    magnitude = magnitude.view(*magnitude.shape, *[1] * (weight.ndim - magnitude.ndim))
    others = [dim for dim, size in enumerate(magnitude.shape) if size == 1]
    norm = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
    return merged * (magnitude / norm) - base
