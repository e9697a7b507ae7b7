"""Recipes: strict, and every mistake reported at once."""

from pathlib import Path

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
