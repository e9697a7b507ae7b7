"""A run's folder is an adapter, and pictures are drawn with its validation's settings."""

import re
import shutil
from pathlib import Path

import pytest

from adapters import (
    Sampling,
    StageSampling,
    UserError,
    combine,
    generate,
    inspect,
    load_cascade,
    read_picture_info,
)
from adapters import errors as messages
from adapters.cascade.as_trained import find_sampling
from adapters.files.info import AdapterInfo, read_info
from adapters.files.model_card import CARD, write_card
from adapters.files.places import adapter_path
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import cascade_of, same, weights
from tests.builders.commands import refusal
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import recipe_of, train

SETTINGS = {
    "stage_1": {"steps": 3, "guidance": 2.0},
    "stage_2": {"steps": 2, "guidance": 1.0, "noise_level": 80},
}
TRAINED = Sampling(
    stage_1=StageSampling(steps=3, guidance=2.0),
    stage_2=StageSampling(steps=2, guidance=1.0, noise_level=80),
)


@pytest.fixture(scope="module")
def trained(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_of(random_cascade, folder, validation={"sampling": SETTINGS})
    train(recipe)
    (recipe.folder / "recipe.yaml").write_text(recipe.to_yaml())
    return recipe.folder


@pytest.fixture
def dog(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "dog"))


def info_of(stage: int, **sampling: dict[str, float]) -> AdapterInfo:
    return AdapterInfo(
        base_model="base",
        stage=stage,
        spec=AdapterSpec(),
        step=1,
        recipe="",
        version="1",
        sampling=sampling or None,
    )


def test_a_run_folder_is_its_adapter(random_cascade: RandomCascade, dog: Path) -> None:
    by_run = cascade_of(random_cascade, adapters=dog)
    assert list(by_run.adapters) == ["dog"]
    assert same(weights(by_run), weights(cascade_of(random_cascade, adapters=[dog / "adapters"])))
    scaled = cascade_of(random_cascade, adapters={str(dog): 0.5})
    assert dict(scaled.adapters) == {"dog": {1: 0.5}}
    assert adapter_path(dog / "adapters") == adapter_path(dog)


def test_every_tool_takes_it(dog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.main([str(dog)])
    assert "sampling      steps 3, guidance 2.0\n" in capsys.readouterr().out
    combine.main([f"{dog}=0.5", f"{dog}=0.5", "--method", "cat", "--out", str(tmp_path / "both")])
    assert (
        read_info(tmp_path / "both" / "stage_1").sampling
        == read_info(dog / "adapters" / "stage_1").sampling
    )


def test_a_run_without_an_export_says_so(dog: Path) -> None:
    shutil.rmtree(dog / "adapters")
    with pytest.raises(UserError, match="has exported no adapter yet; train it to its end"):
        adapter_path(dog)


def test_pictures_are_drawn_as_trained(random_cascade: RandomCascade, dog: Path) -> None:
    cascade = load_cascade(
        random_cascade.stage_1, random_cascade.stage_2, adapters=str(dog), device="cpu"
    )
    assert cascade.as_trained == TRAINED
    pictures = cascade("a cat", sampling="as_trained", progress=False)
    assert pictures.infos[0].sampling == TRAINED
    cascade.set_adapters({})
    with pytest.raises(UserError, match="needs an adapter in use that records"):
        cascade("a cat", sampling="as_trained")
    with pytest.raises(UserError, match="sampling must be a Sampling"):
        cascade("a cat", sampling="trained")  # type: ignore[arg-type]


def test_generate_draws_as_trained_unless_told_otherwise(
    dog: Path, random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*options: str) -> Sampling:
        out = tmp_path / "drawn"
        common = ["--adapter", str(dog), "--prompt", "a cat", "--device", "cpu", "--out", str(out)]
        generate.main([*common, "--stage-2", str(random_cascade.stage_2), *options])
        (picture,) = out.glob("*0*stage_2*.png")
        sampling = read_picture_info(picture).sampling
        shutil.rmtree(out)
        return sampling

    assert draw() == TRAINED
    changed = TRAINED.but(stage_1=StageSampling(guidance=5.0))
    assert draw("--stage-1-guidance", "5") == changed
    few = ("--stage-1-steps", "2", "--stage-2-steps", "2")
    published = Sampling(stage_1=StageSampling(steps=2), stage_2=StageSampling(steps=2))
    assert draw("--sampling", "published", *few) == published
    said = refusal(
        capsys,
        generate.main,
        *("--prompt", "a cat", "--out", tmp_path, "--sampling", "as_trained"),
        *("--stage-1", random_cascade.stage_1),
    )
    assert "No adapter records the settings" in said


def test_the_first_of_several_is_taken_and_the_others_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    messages.print_once.cache_clear()
    low, high = {"guidance": 3.0}, {"guidance": 9.0}
    both = find_sampling(
        [
            ("old", None),
            ("dog", info_of(1, stage_1=low, stage_2={"noise_level": 10})),
            ("style", info_of(1, stage_1=high, stage_2={"noise_level": 10})),
            ("fine", info_of(2, stage_1=high, stage_2={"noise_level": 99})),
        ]
    )
    assert both is not None
    assert both.stage_1.guidance == 3.0
    assert both.stage_2.noise_level == 99, "of the adapter of Stage II"
    said = capsys.readouterr().err
    assert "Stage I is drawn with the settings that dog was trained with" in said
    assert "those of style." in said
    assert said.count("\n") == 1
    assert find_sampling([("old", None)]) is None


def test_a_card_tells_the_settings(dog: Path) -> None:
    folder = dog / "adapters"
    card = (folder / CARD).read_text()
    assert 'seed=0, sampling="as_trained")' in card
    assert "| 1 |  | 3 | 2 |  |" in card
    call = re.search(r"^pictures = pipe\((.*)\)\.images$", card, re.MULTILINE)
    assert call is not None
    assert call[1].endswith("num_inference_steps=3, guidance_scale=2.0")
    info = read_info(folder / "stage_1").model_copy(update={"sampling": None})
    silent = write_card(folder, [info]).read_text()
    assert "as_trained" not in silent
    assert "pipe(" not in silent
