"""The published models' sizes, for estimates on a machine that does not have their gated files.

The UNets of Stage I follow from the published conversion; their parameters are those of the model
cards. Those of Stage II are stand-ins of the published size and kinds of blocks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adapters.base.component_files import INDEX, ModelFiles
from adapters.base.configurations import CONFIG
from adapters.base.source import PIPELINES, Source
from adapters.errors import UserError

REPOSITORIES: Mapping[str, str] = MappingProxyType(
    {
        "DeepFloyd/IF-I-M-v1.0": "IF-I-M",
        "DeepFloyd/IF-I-L-v1.0": "IF-I-L",
        "DeepFloyd/IF-I-XL-v1.0": "IF-I-XL",
        "DeepFloyd/IF-II-M-v1.0": "IF-II-M-sized",
        "DeepFloyd/IF-II-L-v1.0": "IF-II-L-sized",
    }
)
"""The names of the UNets in ``published_unets.json``, by the repository of the model."""

T5_XXL: Mapping[str, Any] = MappingProxyType(
    {"vocab_size": 32128, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
)
"""T5 v1.1 XXL's encoder; its width is the UNets' ``encoder_hid_dim``."""

CLIP_VISION: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    }
)
"""The safety checker's ViT-L/14."""

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
}
"""The part of the published noise schedule that sizes and checks depend on."""


@cache
def read_unets() -> Mapping[str, Any]:
    """Read the configurations of the published UNets, by name."""
    text = Path(__file__).with_name("published_unets.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))


@dataclass(frozen=True)
class PublishedFiles(ModelFiles):
    """The configuration files of a published model, from their sizes; it has no weights."""

    @cached_property
    def index(self) -> dict[str, Any]:
        """The model's index: its components by name."""
        stage = 2 if "-II-" in REPOSITORIES[self.name] else 1
        noising = {"image_noising_scheduler": ["diffusers", "DDPMScheduler"]}
        return {
            "_class_name": PIPELINES[stage],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
            "scheduler": ["diffusers", "DDPMScheduler"],
            **(noising if stage == 2 else {}),
        }

    @property
    def listing(self) -> Mapping[str, int]:
        """No sizes of files: the hub has not been asked."""
        return {}

    @property
    def is_listed(self) -> bool:
        """False: the files are not known."""
        return False

    def read_config(self, place: str) -> dict[str, Any]:
        """Compose a configuration file, such as ``unet/config.json``."""
        unet = dict(read_unets()[REPOSITORIES[self.name]])
        text = {"d_model": unet["encoder_hid_dim"], "d_kv": 64, "feed_forward_proj": "gated-gelu"}
        configs = {
            INDEX: self.index,
            f"unet/{CONFIG}": unet | {"encoder_hid_dim_type": "text_proj"},
            f"text_encoder/{CONFIG}": {**text, **T5_XXL},
            f"safety_checker/{CONFIG}": {"vision_config": dict(CLIP_VISION)},
            "scheduler/scheduler_config.json": dict(SCHEDULE),
            "image_noising_scheduler/scheduler_config.json": dict(SCHEDULE),
        }
        return configs[place]


class PublishedSource(Source):
    """A published model of which only the sizes are known; nothing can be loaded from it."""

    @cached_property
    def _any_files(self) -> ModelFiles:
        return PublishedFiles(self.name)


@cache  # without a network, each question to the hub takes a second
def find_sizes(source: Source) -> Source:
    """Return a source whose sizes are known: itself, or the stand-in for a published model.

    Raises:
        UserError: if the configuration cannot be read, unless the model is a published one.
    """
    needed = [f"unet/{CONFIG}", *([f"text_encoder/{CONFIG}"] if source.stage == 1 else [])]
    try:
        for place in needed:
            source.files.read_config(place)
    except UserError:
        stand_in = PublishedSource(source.name, source.stage)
        if source.name not in REPOSITORIES or stand_in.class_name != PIPELINES[source.stage]:
            raise
        return stand_in
    return source
