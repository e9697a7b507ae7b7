"""Precisions by name, without torch; and the setting of its allocator."""

import os
import subprocess
import sys
from typing import get_args

import pytest
import torch

from tests.builders import ROOT
from unets.precision import PRECISIONS, Precision, automatic_precision, compute_dtype, dtype_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_names_come_without_torch() -> None:
    command = "import sys, unets.precision; print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.stdout == "False\n"


@pytest.mark.parametrize("given", ["", "backend:native"])
def test_memory_grows_in_one_piece_unless_the_user_says_otherwise(given: str) -> None:
    command = "import os, unets; print(os.environ['PYTORCH_ALLOC_CONF'])"
    unset = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTORCH_ALLOC_CONF": given} if given else {}
    run = [sys.executable, "-c", command]
    shown = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.stdout == (given or "expandable_segments:True") + "\n"


def test_every_precision_has_a_dtype_to_compute_in() -> None:
    names = get_args(Precision)
    assert {automatic_precision(device) for device in (CPU, GPU)} == {"fp32", "bf16"}
    assert [dtype_of(name) for name in PRECISIONS] == [torch.float32, torch.bfloat16, torch.float16]
    for name in names:
        quantised = name not in PRECISIONS
        assert compute_dtype(name, GPU) == (torch.bfloat16 if quantised else dtype_of(name))
        assert compute_dtype(name, CPU) == (torch.float32 if quantised else dtype_of(name))
