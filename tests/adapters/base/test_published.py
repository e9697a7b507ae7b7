"""Published models whose files are out of reach, by their sizes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from adapters.base.estimates import safety_checker_bytes, text_encoder_bytes
from adapters.base.published import REPOSITORIES, PublishedSource, find_sizes
from adapters.base.source import Source
from adapters.errors import UserError
from finetune.memory.published import use_published_sizes
from finetune.memory.report import say_sizes_used
from finetune.recipe.file import load_recipe
from tests.builders.hub_stand_in import HubStandIn, hub_stand_in
from tests.builders.random_cascade import RandomCascade
from unets.loading import blank_unet

# of the models' cards
PARAMETERS = {
    "IF-I-M": 400e6,
    "IF-I-L": 900e6,
    "IF-I-XL": 4.3e9,
    "IF-II-M": 450e6,
    "IF-II-L": 1.2e9,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    find_sizes.cache_clear()
    with hub_stand_in() as hub:
        yield hub
    find_sizes.cache_clear()


@pytest.mark.parametrize("name", REPOSITORIES)
def test_sizes_are_those_of_the_cards(name: str) -> None:
    size = name.removeprefix("DeepFloyd/").removesuffix("-v1.0")
    stage = 2 if "-II-" in name else 1
    source = PublishedSource(name, stage)
    unet = blank_unet(source.unet_config, "bf16", torch.device("cuda"))
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == pytest.approx(PARAMETERS[size], rel=0.15)
    assert source.picture_size_px == {1: 64, 2: 256}[stage]
    assert source.scheduler("scheduler").config.num_train_timesteps == 1000


def test_the_text_encoder_is_t5_xxl_and_a_checker_visits() -> None:
    source = PublishedSource("DeepFloyd/IF-I-XL-v1.0", 1)
    whole, _ = text_encoder_bytes(source, "bf16")
    assert whole == pytest.approx(2 * 4.76e9, rel=0.03)
    assert safety_checker_bytes(source, torch.bfloat16) > 2 * 300e6


def test_they_stand_in_only_for_what_cannot_be_read(
    hub: HubStandIn, random_cascade: RandomCascade
) -> None:
    xl, other = "DeepFloyd/IF-I-XL-v1.0", "somebody/else"
    assert isinstance(find_sizes(Source(xl, 1)), PublishedSource)
    here = Source(str(random_cascade.stage_1), 1)
    assert find_sizes(here) is here
    with pytest.raises(UserError, match=other):
        find_sizes(Source(other, 1))
    find_sizes.cache_clear()
    hub.publish(xl, random_cascade.stage_1)
    assert find_sizes(Source(xl, 1)).picture_size_px == 16, "the model's own"


def test_shipped_recipes_say_whose_sizes_are_used(hub: HubStandIn) -> None:
    recipe = load_recipe("recipes/dreambooth_cascade.yaml")
    sized, unread = use_published_sizes(recipe)
    assert unread == ["DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0"]
    assert sized.crops_px == [64, 256]
    assert "IF-I-XL-v1.0 and DeepFloyd/IF-II-L-v1.0 cannot be read here" in say_sizes_used(unread)
    assert say_sizes_used([]) == ""
    assert sized.to_yaml() == recipe.to_yaml()
    own = load_recipe(Path("recipes/quickstart.yaml"))
    assert use_published_sizes(own) == (own, [])
