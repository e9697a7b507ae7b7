"""Similarities of pictures, training pictures and prompts, from their unit vectors.

CLIP-I, CLIP-T, DINO, DIV and PRES are those of DreamBooth (arXiv 2208.12242, section 4.2 and
supplement), except that DIV measures distance in the encoder's space and not by LPIPS.

Shapes: N generated pictures, M real pictures, E the width of the encoder's space.
"""

import torch
from torch import Tensor

from finetune.evaluation.encoders import ClipScorer as ClipScorer

ROWS = 1000
"""The number of pictures compared with all others at once, which bounds the memory."""


def likeness(generated: Tensor, real: Tensor) -> Tensor:
    """Average the cosines of each generated picture with all real ones, [N]."""
    return generated.double() @ real.double().mean(0)


def likeness_among(real: Tensor) -> Tensor:
    """Average the cosines of each real picture with all the others, [M]; M is at least 2."""
    others = len(real) - 1
    real = real.double()
    # a vector's cosine with itself is its squared length, which is 1 only up to rounding
    return (real @ real.sum(0) - real.square().sum(-1)) / others


def faithfulness(generated: Tensor, texts: Tensor) -> Tensor:
    """Compute the cosine of each picture and its own prompt, [N]."""
    return (generated.double() * texts.double()).sum(-1)


def diversities(generated: Tensor) -> Tensor:
    """Average 1 - cosine of each picture of one prompt with the others, [N]; N is at least 2.

    DreamBooth's DIV is the same average of LPIPS, a distance learnt from people's judgements.
    """
    return 1.0 - likeness_among(generated)


def nearest(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Find the real picture most similar to each generated one: cosines [N] and rows [N]."""
    found = (generated.double() @ real.double().T).max(dim=-1)
    return found.values, found.indices


def nearest_among(real: Tensor) -> Tensor:
    """Compute the cosine of each real picture with the most similar other one, [M], M > 1."""
    real, found = real.double(), []
    for start in range(0, len(real), ROWS):
        cosines = real[start : start + ROWS] @ real.T
        cosines.diagonal(start).fill_(-torch.inf)  # of each picture with itself
        found.append(cosines.max(dim=-1).values)
    return torch.cat(found)


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Compute the Fréchet distance of two sets of vectors as if both were normally distributed.

    It is |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) with means m and covariances C (FID, arXiv
    1706.08500, which takes an Inception network's vectors). With C = AᵀA, A the centred vectors
    over sqrt(count - 1), the last trace is the sum of the singular values of A1 A2ᵀ, so no root of
    a matrix is taken; those of R1 R2ᵀ are the same, with A = QR and Q orthogonal. Both sets
    need two vectors or more; far fewer than E overestimate it.
    """
    means, factors = [], []
    for vectors in (generated.double(), real.double()):
        means.append(vectors.mean(0))
        centred = (vectors - means[-1]) / (len(vectors) - 1) ** 0.5
        factors.append(torch.linalg.qr(centred, mode="r").R)
    one, other = factors
    root = torch.linalg.svdvals(one @ other.T).sum()
    spread = one.square().sum() + other.square().sum() - 2 * root
    return float((means[0] - means[1]).square().sum() + spread)


def clip_i(generated: Tensor, real: Tensor) -> float:
    """Average the cosines of all generated and real pictures: subject fidelity, at most 1."""
    return float(likeness(generated, real).mean())


def clip_i_ceiling(real: Tensor) -> float | None:
    """Average the cosines of all pairs of different real pictures: the most CLIP-I can reach.

    Returns ``None`` if there is only one picture.
    """
    return float(likeness_among(real).mean()) if len(real) > 1 else None


def clip_t(generated: Tensor, texts: Tensor) -> float:
    """Average the cosine of each picture and its own prompt: prompt fidelity."""
    return float(faithfulness(generated, texts).mean())
