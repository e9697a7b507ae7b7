"""Exported adapters in plain diffusers pipelines: mixed, fused, and swapped while loaded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from adapters import Parts, load_cascade
from adapters.files.info import read_info
from adapters.files.model_card import write_card
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import PIPELINES, base_of, export, name_of, trained_unet
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet, output, unet_inputs

SPECS = [
    AdapterSpec(kind="lora", rank=4, alpha=6.0, targets="attention+conv"),
    AdapterSpec(kind="rslora", rank=4, alpha=6.0, targets="attention+conv"),
]
TARGET_RANK = 8
ROUNDING = {"rtol": 0, "atol": 1e-5}


@dataclass(frozen=True)
class Trained:
    """Adapters of a stage by name, as trained and as exported."""

    stage: int
    base: Path
    unets: dict[str, UNet2DConditionModel]
    folders: dict[str, Path]
    inputs: dict[str, Tensor]

    def output(self, name: str) -> Tensor:
        return output(self.unets[name], self.inputs)

    def pipeline(self) -> DiffusionPipeline:
        """Plain diffusers' own, without an adapter."""
        pipe = PIPELINES[self.stage].from_pretrained(self.base, text_encoder=None)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def output_of(self, pipe: DiffusionPipeline) -> Tensor:
        return output(pipe.unet.eval().requires_grad_(False), self.inputs)


def trained_adapters(
    cascade: RandomCascade, stage: int, specs: dict[str, AdapterSpec], folder: Path
) -> Trained:
    base = base_of(cascade, stage)
    folders, unets = {}, {}
    for seed, (name, spec) in enumerate(specs.items()):
        unet = trained_unet(base, spec, seed)
        folders[name] = export(unet, folder / name, base, stage, spec).folder
        unets[name] = unet.requires_grad_(False)
    return Trained(stage, base, unets, folders, unet_inputs(unets[name]))


@pytest.fixture(scope="module", params=enumerate(SPECS, 1), ids=lambda p: f"{name_of(p[1])}-{p[0]}")
def trained(
    request: pytest.FixtureRequest,
    random_cascade: RandomCascade,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """Of a kind: ``a``, ``b`` of its rank, and ``small`` of a lower one."""
    stage, spec = request.param
    small = spec.model_copy(update={"rank": 2, "alpha": 5.0})
    specs = {"a": spec, "b": spec.model_copy(update={"alpha": 2.5}), "small": small}
    return trained_adapters(random_cascade, stage, specs, tmp_path_factory.mktemp("trained"))


def picture(pipe: DiffusionPipeline) -> np.ndarray:
    """A picture of a stage's pipeline, in grey levels."""
    pipe.unet.eval().requires_grad_(False)  # PyTorch's choice of kernel depends on it
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 1, 5, pipe.unet.config.encoder_hid_dim, generator=generator)
    low_res = {"image": torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1, "noise_level": 100}
    images = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        generator=generator,
        num_inference_steps=2,
        guidance_scale=2.0,
        **(low_res if pipe.unet.config.in_channels == 6 else {}),
    ).images
    return np.asarray(images[0], dtype=np.int16)


def mixed_by_peft(trained: Trained, weights: dict[str, float]) -> PeftModel:
    """A UNet with several adapters side by side, the update of each times its weight."""
    (first, folder), *others = ((name, trained.folders[name]) for name in weights)
    model = PeftModel.from_pretrained(load_unet(trained.base), str(folder), adapter_name=first)
    for name, folder in others:
        model.load_adapter(str(folder), adapter_name=name)
    model.base_model.set_adapter(list(weights))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling = {name: layer.scaling[name] * weights[name] for name in weights}
    return model.eval().requires_grad_(False)


def test_set_adapters_mixes_as_peft_does(trained: Trained) -> None:
    pipe = trained.pipeline()
    alone = {name: trained.output(name) for name in ("a", "b")}
    for name in alone:
        pipe.load_lora_weights(trained.folders[name], adapter_name=name)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    for name, weights in {"a": [1.0, 0.0], "b": [0.0, 1.0]}.items():
        pipe.set_adapters(list(alone), weights)
        assert torch.equal(trained.output_of(pipe), alone[name])
    weights = {"a": 0.5, "b": 0.75}
    pipe.set_adapters(list(weights), list(weights.values()))
    expected = output(mixed_by_peft(trained, weights), trained.inputs)
    assert torch.equal(trained.output_of(pipe), expected)
    assert not any(torch.allclose(expected, one, atol=1e-3) for one in alone.values())


def test_fuse_lora_draws_as_trained_and_as_the_cascade_here(trained: Trained) -> None:
    pipe = trained.pipeline()
    untouched = picture(pipe)
    pipe.load_lora_weights(trained.folders["a"])
    drawn = {"loaded": picture(pipe)}
    for name, change in {"fused": pipe.fuse_lora, "unfused": pipe.unfuse_lora}.items():
        change()
        drawn[name] = picture(pipe)
        torch.testing.assert_close(trained.output_of(pipe), trained.output("a"), **ROUNDING)
    stage = {f"stage_{trained.stage}": trained.base}
    cascade = load_cascade(
        **stage, adapters=[trained.folders["a"]], parts=Parts(text_encoder=False)
    )
    drawn["merged here"] = picture(cascade.stages[trained.stage])
    pipe.register_modules(unet=trained.unets["a"])
    expected = picture(pipe)
    differences = {name: int(np.abs(each - expected).max()) for name, each in drawn.items()}
    assert differences["loaded"] == 0
    assert max(differences.values()) <= 1
    assert np.abs(untouched - expected).max() > 10


def test_hotswap_puts_another_in_its_place(trained: Trained) -> None:
    pipe = trained.pipeline()
    pipe.load_lora_weights(trained.folders["a"], adapter_name="a")
    assert torch.equal(trained.output_of(pipe), trained.output("a"))
    pipe.load_lora_weights(trained.folders["b"], adapter_name="a", hotswap=True)
    assert torch.equal(trained.output_of(pipe), trained.output("b"))


def test_hotswap_puts_one_of_another_rank_in_its_place(trained: Trained) -> None:
    """Zeros fill both up to the common rank: sums of as many terms, in another order."""
    pipe = trained.pipeline()
    pipe.enable_lora_hotswap(target_rank=TARGET_RANK)
    pipe.load_lora_weights(trained.folders["a"], adapter_name="a")
    torch.testing.assert_close(trained.output_of(pipe), trained.output("a"), **ROUNDING)
    pipe.load_lora_weights(trained.folders["small"], adapter_name="a", hotswap=True)
    torch.testing.assert_close(trained.output_of(pipe), trained.output("small"), **ROUNDING)
    assert not torch.allclose(trained.output("a"), trained.output("small"), atol=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_dora_loads_alone_and_its_card_says_so(
    random_cascade: RandomCascade, tmp_path: Path, stage: int
) -> None:
    kinds = ("lora", "dora")
    specs = {k: AdapterSpec(kind=k, rank=4, alpha=6.0, targets="attention+conv") for k in kinds}
    trained = trained_adapters(random_cascade, stage, specs, tmp_path)
    pipe = trained.pipeline()
    untouched = trained.output_of(pipe)
    pipe.load_lora_weights(trained.folders["dora"], adapter_name="dora")
    assert torch.equal(trained.output_of(pipe), trained.output("dora"))
    pipe.delete_adapters("dora")
    assert torch.equal(trained.output_of(pipe), untouched)
    infos = {kind: read_info(folder) for kind, folder in trained.folders.items()}
    cards = {k: write_card(tmp_path / k, [info]).read_text() for k, info in infos.items()}
    sentence = "neither mixing by `set_adapters` nor swapping by `hotswap=True`"
    assert {kind: sentence in card for kind, card in cards.items()} == {"lora": False, "dora": True}
