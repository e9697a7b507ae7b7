"""Sampling settings: upstream's respaced timesteps by name, in every place where settings are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline
from diffusers.pipelines import deepfloyd_if
from PIL import Image
from pydantic import BaseModel, ValidationError

from adapters import Cascade, Parts, Sampling, UserError, load_cascade
from adapters.cascade.sampling import TIMESTEPS, StageSampling
from adapters.generate import FLAGS, parser
from adapters.generate import main as generate
from finetune.recipe.file import load_recipe
from finetune.run.early_checks import check_recipe
from tests.builders.drawing import pixels
from tests.builders.random_cascade import SCHEDULER, RandomCascade
from tests.builders.recipes import SMALL, write

CPU = torch.device("cpu")
SPACED = Sampling(
    stage_1=StageSampling(timesteps="fast27", guidance=3.0),
    stage_2=StageSampling(timesteps="super27", noise_level=100),
)


def test_the_names_and_timesteps_are_those_of_diffusers() -> None:
    names = {name for name in dir(deepfloyd_if) if name.endswith("_timesteps")}
    assert {f"{name}_timesteps" for name in TIMESTEPS} == names
    for name, count in TIMESTEPS.items():
        timesteps = getattr(deepfloyd_if, f"{name}_timesteps")
        assert Sampling(stage_2=StageSampling(timesteps=name)).timesteps(2) == timesteps
        assert len(timesteps) == count


def test_pictures_of_named_timesteps_are_those_of_the_plain_pipelines(
    random_cascade: RandomCascade,
) -> None:
    plain_1 = IFPipeline.from_pretrained(random_cascade.stage_1)
    plain_2 = IFSuperResolutionPipeline.from_pretrained(random_cascade.stage_2)
    low_res = plain_1(
        "a cat",
        generator=torch.Generator().manual_seed(5),
        timesteps=deepfloyd_if.fast27_timesteps,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    picture = plain_2(
        "a cat",
        image=low_res,
        generator=torch.Generator().manual_seed(5),
        timesteps=deepfloyd_if.super27_timesteps,
        noise_level=100,
    ).images[0]
    cascade = load_cascade(random_cascade.stage_1, random_cascade.stage_2)
    images = cascade("a cat", seed=5, sampling=SPACED, progress=False)
    assert torch.equal(images.low_res, low_res)
    assert np.array_equal(pixels(images.stage_2[0]), pixels(picture))


def test_named_timesteps_decide_on_the_steps() -> None:
    assert SPACED.stage_1.steps == SPACED.stage_2.steps == 27
    assert Sampling(stage_1=StageSampling(timesteps="smart50", steps=50)).stage_1.steps == 50
    assert Sampling.model_validate_json(SPACED.model_dump_json()) == SPACED
    for steps in (100, 26):
        with pytest.raises(UserError, match="fast27 has 27 steps: leave this out"):
            Sampling(stage_1=StageSampling(timesteps="fast27", steps=steps))
    with pytest.raises(UserError, match=r"unknown name 'fast72'; did you mean fast27\?"):
        Sampling(stage_2=StageSampling(timesteps="fast72"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"stage_1": {"timesteps": "none"}},
            "stage_1.timesteps: unknown name 'none'; valid: fast27, smart27, smart50, smart100,"
            " smart185, super27, super40, super100.",
        ),
        (
            {"stage_1": {"timesteps": "fast99"}},
            f"did you mean fast27? (valid: {', '.join(TIMESTEPS)}).",
        ),
        (
            {"stage_2": {"noise_level": -1}},
            "stage_2.noise_level: must be at least 0 (got -1).",
        ),
        (
            {"stage_2": {"noise_levl": 3}},
            "stage_2.noise_levl: unknown setting; did you mean noise_level?",
        ),
        ({"stage_4": {}}, "stage_4: unknown setting; did you mean stage_3?"),
        (
            {"stage_1": {"noise_level": 3}},
            "stage_1: Stage 1 takes no noise_level: leave it out (got 3).",
        ),
        ({"stage_1_steps": 3}, "stage_1_steps is now stage_1: {steps: …} (stage_1.steps)."),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    for make in (Sampling, Sampling().but):
        with pytest.raises(UserError) as caught:
            make(**settings)
        assert str(caught.value).endswith(sentence)
        assert isinstance(caught.value, ValueError)


def test_validation_still_tells_all_mistakes_and_their_places() -> None:
    class Section(BaseModel):
        sampling: Sampling

    with pytest.raises(ValidationError) as caught:
        Section.model_validate(
            {"sampling": {"stage_1": {"steps": 0}, "stage_2": {"noise_level": -1}}}
        )
    places = [mistake["loc"] for mistake in caught.value.errors()]
    assert places == [("sampling", "stage_1", "steps"), ("sampling", "stage_2", "noise_level")]


def test_steps_and_timesteps_replace_one_another() -> None:
    fewer = SPACED.but(stage_1=StageSampling(steps=3))
    assert (fewer.stage_1.timesteps, fewer.stage_1.steps) == (None, 3)
    assert fewer.stage_2.timesteps == "super27"
    assert fewer.but(stage_1=StageSampling(timesteps="fast27")) == SPACED
    assert SPACED.but() == SPACED
    assert SPACED.but(stage_2=StageSampling(noise_level=3)).stage_2.noise_level == 3
    with pytest.raises(UserError, match="leave this out"):
        SPACED.but(stage_1=StageSampling(timesteps="fast27", steps=3))


def with_training_timesteps(cascade: RandomCascade, stage: int, count: int) -> Cascade:
    loaded = load_cascade(cascade.stage_1, cascade.stage_2, parts=Parts(text_encoder=False))
    settings = {**SCHEDULER, "num_train_timesteps": count}
    loaded.stages[stage].register_modules(scheduler=DDPMScheduler(**settings))
    return loaded


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("count", [500, 2000])
def test_named_timesteps_are_for_schedules_of_their_length(
    random_cascade: RandomCascade, stage: int, count: int
) -> None:
    cascade = with_training_timesteps(random_cascade, stage, count)
    embeds = {"a": torch.ones(5, 32), "": torch.zeros(5, 32)}
    sentence = rf"stage_{stage}.timesteps are spaced over 1000 .* Stage {stage} .* has {count}"
    with pytest.raises(UserError, match=sentence):
        cascade("a", embeds=embeds, sampling=SPACED)
    few = Sampling(stage_1=StageSampling(steps=2), stage_2=StageSampling(steps=2))
    assert cascade("a", embeds=embeds, sampling=few, progress=False).final


def test_a_recipe_names_timesteps(tmp_path: Path, random_cascade: RandomCascade) -> None:
    recipe = load_recipe(
        write(tmp_path, SMALL + "validation: {sampling: {stage_1: {timesteps: smart50}}}"),
        ["prior.prompts=[a dog]", "prior.sampling.stage_2.timesteps=super27"],
    )
    assert recipe.validation.sampling.stage_1.steps == 50
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    wrong = "validation: {sampling: {stage_1: {timesteps: smart5}, stage_2: {timesteps: super27, "
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, SMALL + wrong + "steps: 50}}}"))
    rows = [row.strip() for row in str(caught.value).splitlines()[1:]]
    assert rows == [
        "validation.sampling.stage_1.timesteps: unknown name 'smart5'; did you mean smart50?",
        "validation.sampling.stage_2.steps: super27 has 27 steps: leave this out (got 50)",
    ]


def test_a_recipe_whose_base_lacks_the_timesteps_is_found_out_before_training(
    tmp_path: Path, random_cascade: RandomCascade
) -> None:
    base = tmp_path / "base"
    pipe = IFPipeline.from_pretrained(random_cascade.stage_1)
    settings = {**SCHEDULER, "num_train_timesteps": 500}
    pipe.register_modules(scheduler=DDPMScheduler(**settings))
    pipe.save_pretrained(base)
    path = write(tmp_path, SMALL + "validation: {sampling: {stage_1: {steps: 500}}}")
    check_recipe(load_recipe(path, [f"base.stage_1={base}"]), CPU)
    with pytest.raises(UserError, match=r"stage_1\.steps is 501, but this cascade allows 500"):
        check_recipe(
            load_recipe(path, [f"base.stage_1={base}", "validation.sampling.stage_1.steps=501"]),
            CPU,
        )
    path = write(tmp_path, SMALL + "validation: {sampling: {stage_1: {timesteps: fast27}}}")
    with pytest.raises(UserError, match=r"stage_1\.timesteps are spaced over 1000"):
        check_recipe(load_recipe(path, [f"base.stage_1={base}"]), CPU)


def test_the_command_line_names_timesteps(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--stage-1", str(random_cascade.stage_1), "--prompt", "a cat"]
    generate([*base, "--stage-1-timesteps", "fast27", "--out", str(tmp_path / "named")])
    drawn = Image.open(tmp_path / "named" / "000-a-cat-seed0-stage_1.png")
    expected = load_cascade(random_cascade.stage_1)(
        "a cat", sampling=Sampling(stage_1=StageSampling(timesteps="fast27")), progress=False
    )
    assert np.array_equal(pixels(drawn), pixels(expected.final[0]))
    capsys.readouterr()
    for wrong, sentence in {
        "fast72": "--stage-1-timesteps: unknown name 'fast72'; did you mean fast27?",
        "smart50 --stage-1-steps 3": "--stage-1-steps: smart50 has 50 steps: leave this out",
    }.items():
        with pytest.raises(SystemExit):
            generate([*base, "--stage-1-timesteps", *wrong.split(), "--out", str(tmp_path)])
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_every_setting_is_an_option_with_its_default() -> None:
    text = " ".join(parser().format_help().split())
    for flag, (stage, setting) in FLAGS.items():
        default = Sampling().model_dump()[stage][setting]
        assert f"--{flag.replace('_', '-')} " in text
        assert f"({'none' if default is None else f'{default:g}'})" in text
    settings = {(f"stage_{s}", name) for s in (1, 2, 3) for name in StageSampling.model_fields}
    assert settings - set(FLAGS.values()) == {("stage_1", "noise_level"), ("stage_3", "timesteps")}
