"""A contact sheet of the crops that training takes of each picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from adapters.pictures.contact_sheet import contact_sheet
from finetune.data.batches import Batches, derived_seed, picture_at
from finetune.data.pictures import Picture
from finetune.recipe.schema import Recipe

SHOWN = 24
"""The most pictures on a sheet."""

CROPS = 3
"""The number of crops of each picture and stage."""


def draw_crops(recipe: Recipe, pictures: Sequence[Picture]) -> Image.Image:
    """Draw each picture whole, and the first crops that each stage is trained on.

    Args:
        recipe: the run; its crops are functions of its seed.
        pictures: the recipe's, in order; the first :data:`SHOWN` are drawn.
    """
    stages = [(stage, recipe.source(stage).picture_size_px) for stage in recipe.trained]
    rows = [[Image.fromarray(picture.pixels[:])] for picture in pictures[:SHOWN]]
    for stage, size_px in stages:
        training = recipe.training(stage)
        batches = Batches(
            data=recipe.data,
            pictures=pictures,
            class_pictures=(),
            prior=recipe.prior,
            prompt_embeds={},
            batch_size=training.batch_size,
            size_px=size_px,
            low_res_px=None,
            noise_level=(0, 0),
            num_train_timesteps=1,
            seed=derived_seed(recipe.seed, stage.number),  # as in finetune.run.stage_run
            accumulation=training.accumulation,
        )
        for position in range(CROPS * len(pictures)):  # each epoch has every picture once
            index = picture_at(position, len(pictures), batches.seed)
            if index < SHOWN:
                step, place = divmod(position, batches.instance_count)
                rows[index].append(batches.crop_at(step, place))
    columns = ["whole"] + [
        f"{stage.name}, {size_px} px" for stage, size_px in stages for _ in range(CROPS)
    ]
    names = [Path(picture.source).name for picture in pictures[:SHOWN]]
    more = f" (the first {SHOWN} of {len(pictures)} pictures)" * (len(pictures) > SHOWN)
    return contact_sheet(
        rows,
        row_captions=names,
        column_captions=columns,
        title=f"The first crops that {recipe.name} is trained on{more}",
    )
