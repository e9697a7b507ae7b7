"""Make the embedded cascade, models/if-tiny/, and the pictures in datasets/.

    python -m models.make_if_tiny clip
    python -m models.make_if_tiny stage_1
    python -m models.make_if_tiny stage_2      # with the text encoder that stage_1 left
    python -m models.make_if_tiny stage_2 --round 2
    python -m models.make_if_tiny stage_2 --round 3
    python -m models.make_if_tiny evaluate     # figures, and the contact sheet docs/if_tiny.png
    python -m models.make_if_tiny subjects
    python -m models.make_if_tiny sprites      # models/sprites/

The training runs need a GPU and take some minutes each; the rest runs anywhere.
"""

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import T5EncoderModel

from models.architecture import STAGE_1_PX, save_clip
from models.clip_training import ClipPlan, train_clip
from models.evaluate import SamplingPlan, evaluate, write
from models.scenes import FONT, premultiply, rasterise, write_sprites
from models.stage_training import ROUNDS, SceneSampler, StageTrainer, train
from models.subjects import SUBJECTS, write_subjects
from models.truth import OTHERS, OWN
from models.world import THINGS, parse_caption

log = logging.getLogger(__name__)


def _sprites(arguments: argparse.Namespace) -> torch.Tensor:
    return rasterise([thing.character for thing in THINGS], arguments.font)


def make_stage(arguments: argparse.Namespace) -> None:
    """Train a stage: the first round from scratch, later ones from the weights in its folder."""
    name, device, folder = arguments.part, arguments.device, arguments.folder
    plan = ROUNDS[name][arguments.round - 1]
    plan = replace(plan, steps=arguments.steps or plan.steps, batch=arguments.batch or plan.batch)
    torch.backends.cudnn.benchmark = True
    unet, text_encoder = None, None
    if arguments.round > 1:
        unet = UNet2DConditionModel.from_pretrained(folder / name / "unet")
    if name != "stage_1":
        text_encoder = T5EncoderModel.from_pretrained(folder / "stage_1" / "text_encoder")
    trainer = StageTrainer(plan, device, text_encoder, unet)
    low_res_px = STAGE_1_PX if trainer.stage.super_resolution else None
    atlas = premultiply(_sprites(arguments)).to(device)
    sampler = SceneSampler(plan, atlas, trainer.unet.config.sample_size, low_res_px)
    steps = train(trainer, sampler, folder / name, arguments.seconds)
    log.info(f"{name}, round {arguments.round}: {steps} steps of {plan.batch}")


def make_clip(arguments: argparse.Namespace) -> None:
    """Train the CLIP."""
    steps, batch = arguments.steps, arguments.batch
    plan = ClipPlan(steps=steps or ClipPlan.steps, batch=batch or ClipPlan.batch)
    atlas = premultiply(_sprites(arguments)).to(arguments.device)
    save_clip(arguments.folder / "clip", train_clip(plan, atlas))


def make_figures(arguments: argparse.Namespace) -> None:
    """Compare the rankings of sampled and real pictures of the same captions."""
    how = SamplingPlan(batch=arguments.batch or SamplingPlan.batch)
    figures = evaluate(
        arguments.folder, _sprites(arguments), arguments.captions, how, arguments.device
    )
    write(*figures, arguments.sheet)


def make_subjects(arguments: argparse.Namespace) -> None:
    """Draw the pictures of the held-out subjects."""
    write_subjects(arguments.datasets, _sprites(arguments))


def make_sprites(arguments: argparse.Namespace) -> None:
    """Store the sprites that `models.truth` needs, as pictures."""
    subjects = [parse_caption(name)[0] for name in (*SUBJECTS, *OTHERS)]
    write_sprites(_sprites(arguments), sorted({*subjects, *OWN}))


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "stage_1": make_stage,
    "stage_2": make_stage,
    "clip": make_clip,
    "evaluate": make_figures,
    "subjects": make_subjects,
    "sprites": make_sprites,
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, default=Path("models/if-tiny"))
    parser.add_argument("--datasets", type=Path, default=Path("datasets"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/if_tiny.png"))
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of training, at most")
    parser.add_argument("--steps", type=int, help="instead of the plan's")
    parser.add_argument("--batch", type=int, help="instead of the plan's")
    parser.add_argument("--round", type=int, default=1, help="of a stage's training")
    parser.add_argument("--captions", type=int, default=200, help="to evaluate on")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    PARTS[arguments.part](arguments)


if __name__ == "__main__":
    main()
