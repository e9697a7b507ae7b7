"""Encode all captions of a recipe, and nothing else.

python -m finetune.precompute RECIPE [key=value …]
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapters.errors import quiet_libraries
from finetune.command import run_command

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command("precompute", "Encode all captions of a recipe.", arguments, precompute)


def precompute(recipe: "Recipe", options: argparse.Namespace | None = None) -> str:
    """Encode the captions that the cache lacks; return their number and how to train on them."""
    quiet_libraries()
    import torch

    from finetune.data.captions import CaptionCache, collect_captions, embed_captions
    from finetune.data.sources import load_captions

    own = load_captions(recipe.data, recipe.cache)
    captions = {text: f"row {row} of {recipe.data.source}" for row, text in enumerate(own)}
    captions |= collect_captions(recipe, ())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = CaptionCache.of(recipe, device)
    cached = sum(cache.has(caption) for caption in captions)
    embed_captions(captions, cache)
    return (
        f"{len(captions) - cached} captions encoded in {cache.precision} on {cache.device},"
        f" {cached} were already in {cache.folder}.\n"
        "To train on any device without loading the text encoder, add this override:\n"
        f"text.precision={cache.precision}\n"
    )


if __name__ == "__main__":
    main()
