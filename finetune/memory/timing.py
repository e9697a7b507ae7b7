"""The time that a run takes, from the arithmetic of its phases and the rate of a card."""

import json
import time
from pathlib import Path

import torch

from adapters.atomic import write_text
from unets.tally import Tally

OPERATIONS_A_BYTE = 200
"""Floating-point operations that a GPU does while it moves a byte; recent data-centre and desktop
cards are alike in this (H100: 230, RTX 4090: 165)."""

OPERATIONS_A_KERNEL = 1.5e9
"""Floating-point operations that a GPU could do in the time that a tiny kernel takes."""

SHARE = 0.74
"""The share of a card's rate of large matrix products at which steps do their work: 0.80 in Stage I
and 0.68 in Stage II, at batch 4 (``benchmarks.plan_measured``, H100)."""

MATRIX, SECONDS = 8192, 1.0
"""The side of the matrices that are multiplied to measure a rate, and for how long."""


def work_of(tally: Tally) -> float:
    """Return a relative measure of the time that counted operations take on a GPU.

    It is their number of floating-point operations, plus those that could be done while memory is
    moved and kernels are started.
    """
    moved, started = OPERATIONS_A_BYTE * tally.moved_bytes, OPERATIONS_A_KERNEL * tally.operations
    return tally.flops + moved + started


def estimate_seconds(work: float, rate: float) -> float:
    """Estimate the seconds that some work takes on a card whose rate, in FLOP/s, is known."""
    return work / (SHARE * rate)


def find_rate(cache_dir: Path) -> float | None:
    """Find this machine's rate of large bf16 matrix products, in FLOP/s, measured once.

    Args:
        cache_dir: keeps what was measured, by the name of the GPU.

    Returns:
        The rate; ``None``: this machine has no GPU.
    """
    if not torch.cuda.is_available():
        return None
    file, name = cache_dir / "rates.json", torch.cuda.get_device_name()
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))
        return float(rates[name])
    except (OSError, ValueError, LookupError, TypeError):  # not measured, or not by us
        rate = measure_rate(torch.device("cuda"), MATRIX)
        write_text(file, json.dumps({name: rate}))
        return rate


def measure_rate(device: torch.device, side: int) -> float:
    """Measure the rate of products of square bf16 matrices for a second, in FLOP/s."""
    one, other = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    count, started = -1, time.perf_counter()  # the first product also loads the library
    while count < 1 or time.perf_counter() - started < SECONDS:
        product = one @ other
        product[0, 0].item()  # waits for the device
        count += 1
        if count == 0:
            started = time.perf_counter()
    return 2 * side**3 * count / (time.perf_counter() - started)
