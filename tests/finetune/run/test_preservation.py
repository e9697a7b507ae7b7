"""Preservation of the base's output: its target is the base, and a run with it is one run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from adapters.weights.kinds import KINDS, AdapterSpec
from finetune.data.captions import CaptionCache, embed_captions
from finetune.data.pictures import load_pictures
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.run.checkpoints import list_checkpoints
from finetune.run.folders import Folders
from finetune.run.trainee import Trainee
from finetune.step.losses import preservation_loss
from finetune.step.stages import STAGES
from finetune.train import gather
from tests.builders import ROOT
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import batches_for, flat, logged, material_of, recipe_of, train
from tests.builders.small_runs import trainee_of as trainee_of_run
from tests.builders.trainees import batch_of, take_steps, trainee_of
from tests.builders.unets import inputs_of, load_unet, output

PRIOR: Mapping[str, object] = {"kind": "output", "prompts": ["a dog", "a cat"], "weight": 0.7}


@pytest.mark.parametrize(("kind", "stage"), [*((kind, 1) for kind in KINDS), ("lora", 2)])
def test_the_target_is_the_plain_bases_prediction_to_the_bit(
    random_cascade: RandomCascade, kind: str, stage: int
) -> None:
    base = random_cascade.stage(stage)
    spec = AdapterSpec(kind=kind, targets="all", dropout=0.2)
    trainee = trainee_of(base, stage, adapter=spec, gradient_checkpointing=True)
    take_steps(trainee, 2)
    inputs = inputs_of(trainee.unet)
    expected = output(load_unet(base), inputs)
    assert torch.equal(trainee.predict_as_base(inputs), expected)
    trainee.dropout_keys.values = batch_of(trainee).dropout_keys
    assert not torch.equal(output(trainee.unet, inputs), expected)
    assert trainee.unet.training
    trainable = {name for name, p in trainee.unet.named_parameters() if p.requires_grad}
    assert trainable == set(trainee.weights.parameters)


def test_the_bases_own_dropout_is_off_in_the_target(random_cascade: RandomCascade) -> None:
    trainee = trainee_of(random_cascade.stage_1, 1)
    inputs = inputs_of(trainee.unet)
    expected = trainee.predict_as_base(inputs)
    for block in trainee.unet.modules():
        if isinstance(getattr(block, "dropout", None), torch.nn.Dropout):
            block.dropout.p = 0.5
    assert torch.equal(trainee.predict_as_base(inputs), expected)
    assert not torch.equal(output(trainee.unet, inputs), expected)


def test_a_preserved_pictures_loss_is_its_distance_from_the_base(
    random_cascade: RandomCascade,
) -> None:
    """Without min-SNR, and whatever the noise was; the other pictures' losses stay as they were."""
    trainee = trainee_of(random_cascade.stage_1, 1, min_snr_gamma=0.1)
    take_steps(trainee, 2)
    batch = batch_of(trainee, pictures=4)
    plain = trainee.accumulate(batch)
    rows = torch.tensor([1, 3])
    losses = trainee.accumulate(replace(batch, preserved=rows))
    with trainee.final_weights() as unet, torch.no_grad():
        noisy = trainee.schedulers[0].add_noise(batch.pixels, batch.noise, batch.timesteps)
        inputs = {
            "sample": noisy[rows],
            "timestep": batch.timesteps[rows],
            "encoder_hidden_states": batch.prompt_embeds[rows],
        }
        distance = preservation_loss(unet(**inputs).sample, load_base(random_cascade, inputs))
    assert plain.preservation is None
    assert losses.preservation is not None
    for loss in (losses.total[rows], losses.preservation[rows]):
        torch.testing.assert_close(loss, distance, rtol=1e-3, atol=0)
    assert distance.min() > 0
    for found, before in ((losses.total, plain.total), (losses.mse, plain.mse)):
        assert torch.equal(found[[0, 2]], before[[0, 2]])
    assert losses.preservation[[0, 2]].tolist() == losses.mse[rows].tolist() == [0, 0]


def load_base(cascade: RandomCascade, inputs: dict[str, Tensor]) -> Tensor:
    return output(load_unet(cascade.stage_1), inputs)


def divided(recipe: Recipe, ranks: int) -> Tensor:
    """The gradient of a recipe's first step on some processes, whose gradients are averaged."""
    gradients = []
    whole = batches_for(recipe, material_of(recipe))
    for rank in range(ranks):
        trainee = trainee_of_run(recipe)
        draw = torch.Generator().manual_seed(0)
        moved = 0.05 * torch.randn(trainee.weights.values.shape, generator=draw)
        trainee.weights.values += moved  # a fresh adapter predicts as its base does
        trainee.weights.publish()
        for index in range(whole.accumulation):
            trainee.accumulate(replace(whole, rank=rank, world_size=ranks)(index))
        gradients.append(trainee.weights.gradient.clone())
    return torch.stack(gradients).mean(0)


def test_a_global_batch_has_one_gradient_however_it_is_divided(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    """Also where some parts preserve nothing and others nothing but the base's output."""

    def gradient(size: int, accumulation: int, ranks: int, **prior: object) -> Tensor:
        stage = {"batch_size": size, "accumulation": accumulation, "adapter": {"dropout": 0.2}}
        return divided(
            recipe_of(random_cascade, tmp_path, stage=stage, prior={**PRIOR, **prior}), ranks
        )

    whole = gradient(8, 1, 1)
    scale = float(whole.abs().max())
    for division in ((4, 2, 1), (1, 8, 1), (4, 1, 2), (1, 2, 4)):
        found = gradient(*division)
        assert torch.allclose(found, whole, rtol=1e-3, atol=1e-5 * scale), division
    heavier = gradient(8, 1, 1, weight=1.4)
    assert not torch.allclose(heavier, whole, rtol=1e-2, atol=1e-2 * scale)


def test_a_continued_run_ends_at_the_same_bytes(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    def recipe(name: str, steps: int) -> Recipe:
        stage = {"steps": steps, "batch_size": 3, "accumulation": 2, "ema_decay": 0.5}
        return recipe_of(random_cascade, tmp_path, stage=stage, prior=PRIOR, name=name)

    straight = train(recipe("straight", 4))
    train(recipe("stopped", 2))
    continued = train(recipe("stopped", 4))
    assert len(list_checkpoints(Folders(recipe("stopped", 4).folder).checkpoints(STAGES[1]))) == 4
    assert torch.equal(flat(straight), flat(continued))
    curves = {
        tag: logged(recipe("straight", 4), f"loss{tag}")
        for tag in ("", "/mse", "/bound_bits", "/preservation")
    }
    assert curves["/preservation"][0] == pytest.approx(0, abs=1e-9)  # a fresh adapter
    assert min(curves["/preservation"][1:]) > 0
    sums = np.sum([curves[part] for part in ("/mse", "/bound_bits", "/preservation")], axis=0)
    assert curves[""] == pytest.approx(list(sums), rel=1e-5)


@pytest.mark.parametrize(("precision", "said"), [("int8", 1), ("bf16", 0)])
def test_that_a_quantised_bases_own_output_is_preserved_is_said_once(
    random_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    said: int,
) -> None:
    stage = {"steps": 2, "precision": precision, "batch_size": 4}
    train(recipe_of(random_cascade, tmp_path, stage=stage, prior=PRIOR))
    assert capsys.readouterr().out.count(f"the base in {precision}") == said


BASE = ROOT / "models/if-tiny/stage_1"

KNOWN = [
    f"a {thing} on a {colour} background"
    for thing in ("dog face", "pizza", "rocket", "tulip")
    for colour in ("purple", "green", "white")
]
"""Captions for which the embedded cascade's output is preserved."""

OTHERS = ("a cat face on a blue background", "a red apple on a black background")
"""Captions that are neither taught nor preserved."""


def test_other_captions_drift_less_where_output_is_preserved(tmp_path: Path) -> None:
    """And the embedded cascade learns the octopus all the same."""
    drifts = []
    for prior in (None, {"kind": "output", "prompts": KNOWN}):
        recipe = load_recipe(
            ROOT / "recipes/quickstart.yaml",
            [
                *("stage_2=null", "base.stage_2=null", "evaluation=null", "validation={}"),
                "prior=null",
                *(f"base.stage_1={BASE}", f"data.source={ROOT / 'datasets/octopus'}"),
                *("stage_1.steps=8", "stage_1.adapter.targets=attention", "stage_1.timesteps={}"),
                *("stage_1.optimizer.learning_rate=5e-3", f"cache_dir={tmp_path}"),
            ],
        )
        recipe = Recipe.model_validate(recipe.model_dump() | {"prior": prior})
        pictures = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
        material = gather(recipe, pictures, Accelerator(cpu=True))
        trainee, batches = trainee_of_run(recipe), batches_for(recipe, material)
        errors = []
        for index in (*range(recipe.training(STAGES[1]).steps), 0):  # the first again
            batch = batches(index)
            errors.append(float((trainee.accumulate(batch).mse * batch.weight).sum()))
            trainee.update()
        assert errors[-1] < 0.95 * errors[0]
        cache = CaptionCache.of(recipe, torch.device("cpu"))
        drifts.append(drift(trainee, embed_captions(OTHERS, cache)))
    assert drifts[1] < 0.7 * drifts[0]


@torch.no_grad()
def drift(trainee: Trainee, embeds: Mapping[str, Tensor]) -> float:
    """The mean squared distance from the base's prediction of noise, over its captions."""
    text = torch.stack([embeds[caption] for caption in embeds])
    size = trainee.unet.config.sample_size
    inputs = {
        "sample": torch.randn(len(text), 3, size, size, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((len(text),), 700),
        "encoder_hidden_states": text,
    }
    expected = trainee.predict_as_base(inputs)
    with trainee.final_weights() as unet:
        return preservation_loss(unet(**inputs).sample, expected).mean().item()
