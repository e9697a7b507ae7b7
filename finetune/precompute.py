"""Encode all captions of a recipe, and nothing else.

python -m finetune.precompute RECIPE [key=value …]
"""

import argparse
import sys
from collections.abc import Sequence

from adapters.errors import command_line, quiet_libraries
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="finetune.precompute", description="Encode all captions of a recipe."
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. text.precision=nf4")
    options = parser.parse_args(arguments)
    with command_line():
        recipe = load_recipe(options.recipe, options.overrides)
        quiet_libraries()
        sys.stdout.write(precompute(recipe))


def precompute(recipe: Recipe) -> str:
    """Encode what the cache lacks; return how much that was, and how a trainer reuses it."""
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
        f" {cached} were in {cache.folder} already.\n"
        "Train on any device without the text encoder under this override:\n"
        f"text.precision={cache.precision}\n"
    )


if __name__ == "__main__":
    main()
