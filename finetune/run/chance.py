"""Changes beyond chance between two validations, whose pictures have the same seeds."""

import math
from statistics import NormalDist, fmean, stdev

from finetune.run.figures import Validated

LEAST_PICTURES = 4
"""The least number of pictures from which anything is concluded."""

CONFIDENCE = 0.95
"""The share of intervals that hold the true mean."""


def is_certain(before: Validated, now: Validated, tag: str) -> bool:
    """Tell whether a figure's change between two validations is more than chance.

    Their pictures are drawn from the same prompts and seeds, so the changes by picture are compared
    with their own spread. Of fewer than :data:`LEAST_PICTURES` nothing is certain.
    """
    pairs = before.by_picture.get(tag, ()), now.by_picture.get(tag, ())
    if not LEAST_PICTURES <= len(pairs[0]) == len(pairs[1]):
        return False
    changes = [new - old for old, new in zip(*pairs, strict=True)]
    error = stdev(changes) / math.sqrt(len(changes))
    return abs(fmean(changes)) > student_t(len(changes) - 1) * error


def student_t(freedom: int) -> float:
    """Return the standard errors either side of a mean that hold :data:`CONFIDENCE` of means.

    The expansion of Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5, which is
    within 1 % from three degrees of freedom on.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
