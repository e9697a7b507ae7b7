"""Habits from diffusers get a hint, and a table that only shows says what to call."""

import pickle
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from adapters import Cascade, Sampling, StageSampling, UserError, load_cascade
from adapters.cascade.habits import ARGUMENTS, ATTRIBUTES, LOADING
from finetune.recipe.file import load_recipe
from tests.builders.adapters import cascade_of
from tests.builders.random_cascade import TEXT_WIDTH, RandomCascade


@pytest.fixture(scope="module")
def cascade(random_cascade: RandomCascade) -> Cascade:
    return cascade_of(random_cascade)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_pipelines(cascade: Cascade, name: str) -> None:
    with pytest.raises(UserError, match=rf"cascade\(\) takes no {name}: "):
        cascade("a cat", **{name: 1})
    if name != "strength":
        with pytest.raises(UserError, match=rf"takes no {name}: "):
            cascade.img2img(Image.new("RGB", (16, 16)), "a cat", **{name: 1})


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_pipelines(cascade: Cascade, name: str) -> None:
    assert not hasattr(cascade, name)
    with pytest.raises(AttributeError, match=f"a Cascade has no {name}: .*"):
        getattr(cascade, name)


@pytest.mark.parametrize("name", LOADING)
def test_arguments_of_from_pretrained(random_cascade: RandomCascade, name: str) -> None:
    with pytest.raises(UserError, match=rf"load_cascade\(\) takes no {name}: "):
        load_cascade(random_cascade.stage_1, **{name: None})


def test_other_names_are_errors_with_the_closest(
    cascade: Cascade, random_cascade: RandomCascade
) -> None:
    with pytest.raises(TypeError, match=r"'seeds'; did you mean seed\?"):
        cascade("a cat", seeds=[1])
    with pytest.raises(TypeError, match=r"'adaptors'; did you mean adapters\?"):
        load_cascade(random_cascade.stage_1, adaptors="x")
    with pytest.raises(AttributeError, match="no attribute 'qqq'"):
        _ = cascade.qqq


def test_advice_names_what_there_is(cascade: Cascade) -> None:
    called = ["add_adapter", "remove_adapter", "remove_adapters", "set_adapters"]
    called += ["img2img", "inpaint", "encode"]
    assert all(callable(getattr(cascade, name)) for name in called)
    for advice in (*ARGUMENTS.values(), *ATTRIBUTES.values()):
        for name in ("cascade.stages[1].unet", "cascade.stages[1].scheduler"):
            if name in advice:
                assert eval(name, {"cascade": cascade}) is not None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Sampling(steps=5),
            "a setting of each stage: stage_1=StageSampling(steps=…)",
        ),
        (lambda: Sampling(guidance_scale=5), "stage_1=StageSampling(guidance=…)"),
        (lambda: StageSampling(num_inference_steps=5), "it is steps here"),
        (lambda: StageSampling(stpes=5), "did you mean steps?"),
        (lambda: Sampling(stage_1={"guidance_scale": 3}), "it is guidance here"),
        (lambda: Sampling(noise_level=3), "noise_level is now stage_2: {noise_level: …}"),
    ],
)
def test_sampling_settings(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert said in str(error.value)
    assert not str(error.value).startswith(":")


def test_the_table_of_adapters_only_shows(cascade: Cascade) -> None:
    listing = cascade.adapters
    for change in (
        lambda: listing.__setitem__("dog", 0.2),
        lambda: listing.pop("dog"),
        lambda: listing.update(dog=0.2),
        lambda: listing.setdefault("dog", {}),
        listing.clear,
        listing.popitem,
    ):
        with pytest.raises(UserError, match=r"only shows .*set_adapters\(\{name: scale\}\)"):
            change()
    with pytest.raises(UserError, match="only shows"):
        cascade.adapters["dog"] = {1: 0.2}
    with pytest.raises(UserError, match="only shows"):
        del cascade.adapters["dog"]
    assert listing | {"dog": {1: 1.0}} == {"dog": {1: 1.0}}, "a dictionary of one's own"


def test_results_have_no_images_and_short_names(cascade: Cascade) -> None:
    few = Sampling(stage_1=StageSampling(steps=1))
    encodings = {"": torch.zeros(7, TEXT_WIDTH), "a cat": torch.ones(7, TEXT_WIDTH)}
    pictures = cascade("a cat", sampling=few, embeds=encodings, progress=False)
    with pytest.raises(AttributeError, match="see final"):
        _ = pictures.images
    assert pickle.loads(pickle.dumps(pictures)).final[0].size == pictures.final[0].size
    recipe = load_recipe("recipes/quickstart.yaml")
    assert repr(recipe) == (
        "Recipe('quickstart', stage_1: 300 steps, stage_2: 50 steps, datasets/octopus)"
    )
