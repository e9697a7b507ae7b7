"""The figures of a validation's pictures: fidelity, forgetting and copying, by CLIP."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.data.pictures import Picture, crop
from finetune.evaluation.metrics import (
    ClipScorer,
    clip_i_ceiling,
    faithfulness,
    likeness,
)
from finetune.recipe.schema import Evaluation
from finetune.run.figures import (
    CLIP_I,
    CLIP_T,
    NEAREST,
    OTHERS_CLIP_I,
    OTHERS_CLIP_T,
    SAMENESS,
    ceiling_of,
)
from finetune.run.measures import Score
from finetune.run.validation import DrawnRow, Kind


class Likeness:
    """A scorer of validation pictures, loaded once for a run, on the CPU.

    Raises:
        UserError: if the CLIP model cannot be loaded.
    """

    def __init__(self, settings: Evaluation) -> None:
        self.settings, self.scorer = settings, ClipScorer(settings.clip)

    def against_photos(self, pictures: Sequence[Picture], size_px: int) -> Score:
        """Return the score against training pictures, cropped at their centre to a stage's size."""
        rng = np.random.default_rng(0)
        photos = [
            crop(picture, size_px, rng, center_shift=0.0, horizontal_flip=False)
            for picture in pictures
        ]
        real = self.scorer.images(photos)
        ceilings = {ceiling_of(CLIP_I): clip_i_ceiling(real)}
        if len(real) > 1:
            among = real @ real.T
            ceilings[ceiling_of(NEAREST)] = float(among.fill_diagonal_(-1).amax(1).mean())
        reached = {tag: value for tag, value in ceilings.items() if value is not None}

        def score(drawn: Sequence[DrawnRow]) -> dict[str, float | list[float]]:
            """Score the pictures of a validation."""
            figures: dict[str, float | list[float]] = {}
            if any(each.row.kind == "subject" for each in drawn):
                images, texts = self._encode(drawn, "subject")
                figures |= {
                    CLIP_I: likeness(images, real).tolist(),
                    CLIP_T: faithfulness(images, texts).tolist(),
                    NEAREST: float((images @ real.T).amax(1).mean()),
                }
                figures |= reached
                if len(images) > 1:
                    figures[SAMENESS] = mean_cosine(images)
            if any(each.row.kind == "others" for each in drawn):
                images, texts = self._encode(drawn, "others")
                figures |= {
                    OTHERS_CLIP_T: faithfulness(images, texts).tolist(),
                    OTHERS_CLIP_I: likeness(images, real).tolist(),
                }
            return figures

        return score

    def _encode(self, drawn: Sequence[DrawnRow], kind: Kind) -> tuple[Tensor, Tensor]:
        """Return the unit vectors of a kind's pictures and of their prompts, [N, E] each."""
        rows = [each for each in drawn if each.row.kind == kind]
        pictures: list[Image.Image] = list(chain(*(each.pictures for each in rows)))
        prompts = chain(*(each.row.prompts for each in rows))
        identifier, subject = self.settings.identifier, self.settings.subject
        texts = [prompt.replace(identifier, subject) for prompt in prompts]
        return self.scorer.images(pictures), self.scorer.texts(texts)


def mean_cosine(vectors: Tensor) -> float:
    """Average the cosines of all pairs of different unit vectors [N, E]."""
    cosines = vectors @ vectors.T
    pairs = torch.ones_like(cosines).triu(1).bool()
    return float(cosines[pairs].mean())
