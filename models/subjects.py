"""Pictures of held-out subjects, like a user's own photographs: datasets/<subject>/."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.scenes import Placement, compose, premultiply, to_image
from models.world import BACKGROUNDS, THINGS, caption

SUBJECTS = ("octopus", "pineapple", "robot", "alarm clock")
IDENTIFIER = "sks"
PICTURE_PX = 512


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of a subject."""

    background: tuple[str, str]
    """The colour and pattern."""
    x: float
    """The subject's centre, in [-1, 1] across the picture; y likewise."""
    y: float
    scale: float
    """The longer side as a fraction of the picture."""
    tilt_degrees: float


SHOTS = (
    Shot(background=("yellow", "dotted"), x=0.0, y=0.05, scale=0.8, tilt_degrees=0),
    Shot(background=("green", "plain"), x=-0.3, y=-0.2, scale=0.62, tilt_degrees=9),
    Shot(background=("gray", "striped"), x=0.25, y=0.2, scale=0.7, tilt_degrees=-7),
    Shot(background=("orange", "checkered"), x=0.2, y=-0.25, scale=0.65, tilt_degrees=13),
    Shot(background=("white", "plain"), x=-0.1, y=0.1, scale=0.85, tilt_degrees=-3),
    Shot(background=("green", "striped"), x=-0.25, y=0.25, scale=0.68, tilt_degrees=-12),
)
"""The shots of each subject; prompts can ask for blue, purple, teal, pink, red, black or brown."""


def photograph(sprite: Tensor, shot: Shot) -> Tensor:
    """Draw one picture, [3, S, S] in [-1, 1]; `sprite` is [4, P, P] uint8."""
    values = (shot.x, shot.y, shot.scale, math.radians(shot.tilt_degrees), shot.x, shot.y)
    placement = Placement(*(torch.tensor([value]) for value in values))
    background = torch.tensor([BACKGROUNDS.index(shot.background)])
    return compose(premultiply(sprite[None]), background, placement, PICTURE_PX)[0]


def write_subjects(folder: Path, sprites: Tensor) -> None:
    """Write the pictures and captions of all subjects; `sprites` are the world's, [N, 4, P, P]."""
    names = [thing.name for thing in THINGS]
    for name in SUBJECTS:
        index = names.index(name)
        subject = folder / name.replace(" ", "_")
        subject.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, shot in enumerate(SHOTS):
            file = f"{number:02d}.png"
            picture = to_image(photograph(sprites[index], shot))
            picture.save(subject / file, optimize=True)
            text = caption(index, BACKGROUNDS.index(shot.background), IDENTIFIER)
            lines.append(json.dumps({"file_name": file, "text": text}))
        (subject / "metadata.jsonl").write_text("\n".join(lines) + "\n")
