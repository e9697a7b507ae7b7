"""Models that are damaged: the file is named."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.base.source import Source
from adapters.errors import UserError
from tests.builders.random_cascade import RandomCascade


@pytest.mark.parametrize(
    ("stage", "part"),
    [(1, "safety_checker"), (3, "unet"), (3, "vae"), (3, "text_encoder")],
)
def test_values_that_are_no_numbers_are_found_in_every_component(
    stage: int, part: str, guarded_cascade: RandomCascade, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(guarded_cascade.stage(stage), base)
    source = Source(str(base), stage)
    (file,) = (base / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=rf"{re.escape(str(file))}: {re.escape(name)} has values that are NaN"
    ):
        source.pipeline(torch.float32)
