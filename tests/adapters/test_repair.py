"""A repaired file loads whole in plain diffusers; what was being lost is counted as it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model_state_dict

from adapters.errors import UserError
from adapters.repair import main, repair
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import PIPELINES, base_of, export, trained_unet
from tests.builders.other_tools import (
    ATTENTION,
    NAME,
    WRITERS,
    diffusers_script,
    name_of,
    simpletuner,
)
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import output, unet_inputs


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("write", "spec"), WRITERS, ids=name_of)
def test_a_repaired_file_loads_whole_and_exactly(
    random_cascade: RandomCascade,
    tmp_path: Path,
    stage: int,
    write: Callable[[UNet2DConditionModel, Path], Path],
    spec: AdapterSpec,
) -> None:
    base = base_of(random_cascade, stage)
    unet = trained_unet(base, spec)
    file = write(unet, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    repair(file, tmp_path / "new" / "whole.safetensors")
    assert all(path.read_bytes() == content for path, content in before.items())
    pipe = PIPELINES[stage].from_pretrained(base, text_encoder=None)
    pipe.load_lora_weights(tmp_path / "new")
    inputs = unet_inputs(unet)
    loaded, expected = (output(u.eval().requires_grad_(False), inputs) for u in (pipe.unet, unet))
    assert torch.equal(loaded, expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_the_diffusers_script_loses_is_what_a_pipeline_lacks(
    random_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: int,
) -> None:
    base = base_of(random_cascade, stage)
    unet = trained_unet(base, ATTENTION)
    file = diffusers_script(unet, tmp_path)
    pipe = PIPELINES[stage].from_pretrained(base, text_encoder=None)
    pipe.load_lora_weights(file)
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    written = get_peft_model_state_dict(unet)
    arrived = [name for name in loaded if torch.equal(loaded[name], written[name])]
    assert 0 < len(arrived) < len(written)
    main([str(file)])
    lost = len(written) - len(arrived)
    assert f"diffusers loses {lost} of {len(written)} tensors" in capsys.readouterr().out
    assert (tmp_path / "pytorch_lora_weights_repaired.safetensors").exists()


def test_a_whole_file_loses_nothing(random_cascade: RandomCascade, tmp_path: Path) -> None:
    file = simpletuner(trained_unet(random_cascade.stage_1, ATTENTION), tmp_path)
    assert "diffusers loads all 48 tensors" in repair(file)
    assert list(tmp_path.iterdir()) == [file]
    assert "loses 0 of 48 tensors" in repair(file, tmp_path / "again.safetensors")


def test_what_cannot_be_repaired(random_cascade: RandomCascade, tmp_path: Path) -> None:
    base, spec = random_cascade.stage_1, AdapterSpec(kind="loha")
    folder = export(trained_unet(base, spec), tmp_path, base, 1, spec).folder
    with pytest.raises(UserError, match="kind loha, which diffusers cannot load"):
        repair(folder)
    file = simpletuner(trained_unet(base, ATTENTION), tmp_path)
    with pytest.raises(UserError, match="is the file to repair"):
        repair(file, tmp_path / NAME)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere.safetensors")])
