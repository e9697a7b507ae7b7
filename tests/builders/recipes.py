"""Small recipes, and what they encode."""

from collections.abc import Iterable
from pathlib import Path

import torch

from finetune.data.captions import CaptionCache, PromptEmbeds, embed_captions
from finetune.recipe.schema import Recipe

CPU = torch.device("cpu")

SMALL = """
name: small
base: {stage_1: one}
data: {source: pictures}
stage_1: {steps: 5}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def embed(captions: Iterable[str], recipe: Recipe, device: torch.device = CPU) -> PromptEmbeds:
    return embed_captions(captions, CaptionCache.of(recipe, device))
