"""A folder like the repository, in which small random models stand for the embedded cascade."""

from pathlib import Path

from tests.builders import ROOT
from tests.builders.random_cascade import RandomCascade

SHARED = ("recipes", "datasets", "accelerate_config.yaml")
EMBEDDED = "models/if-tiny"


def furnish(folder: Path, cascade: RandomCascade) -> None:
    """Put recipes, pictures, CLIP and both stages of a random cascade in their places."""
    for name in SHARED:
        (folder / name).symlink_to(ROOT / name)
    models = folder / EMBEDDED
    models.mkdir(parents=True)
    for name in ("clip", "captions.txt"):
        (models / name).symlink_to(ROOT / EMBEDDED / name)
    for number in (1, 2):
        (models / f"stage_{number}").symlink_to(cascade.stage(number))
