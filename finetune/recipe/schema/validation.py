"""The ``validation`` section: what is measured during training, and what is kept by it."""

from typing import Annotated, Literal

from pydantic import Field

from adapters.cascade.sampling import Sampling
from adapters.errors import name_in
from finetune.recipe.consistency import JUDGED, Drawing
from finetune.recipe.schema.fields import NonNegative, Positive, Section, Seed
from finetune.recipe.schema.prompts import Prompts, StagePrompts


class Best(Section):
    """The choice of the validation whose adapter is exported.

    It is the latest that is not worse than the best by more than chance, which needs four pictures
    or more, better a dozen, to show.
    """

    figure: Annotated[str, name_in(JUDGED)] = "clip_i"
    """The figure to be best: ``clip_i``, likeness to the subject; ``clip_t``, likeness to the
    prompts; or ``held_out``, the loss on pictures held out of training."""
    keep_others: Annotated[float, Field(gt=0, le=1)] | None = 0.97
    """The least share of the base's CLIP-T that ``validation.other_prompts`` must keep; if no
    validation keeps it, the one that keeps most is exported. ``None``: no bound."""
    patience: Positive | None = None
    """Stop after this many validations in a row without a better one; ``None``: never."""


class Validation(Section):
    """Pictures and losses measured during training, for TensorBoard."""

    prompts: Prompts = ()
    """Prompts to sample, in which ``{}`` is ``evaluation.identifier``; none: no pictures."""
    stage_2_prompts: StagePrompts | None = None
    """Prompts for Stage II, one for each of ``prompts``, often the same without the subject's
    identifier; ``{}`` is ``evaluation.subject``. ``None``: the same."""
    other_prompts: Prompts = ()
    """Prompts without the subject, whose pictures training should not change."""
    through_stage_2: Literal["never", "last", "always"] = "last"
    """When Stage I's pictures are also shown enlarged by the base's Stage II, which is
    loaded for that and freed: never, once at the end, or at each validation."""
    loss_pictures: NonNegative = 50
    """The most training pictures whose loss is measured at fixed noise, each by itself; 0: none."""
    held_out: NonNegative = 0
    """Pictures held out of training, to measure the loss on pictures that are not learnt."""
    every: Positive = 500
    """Steps between validations; there is always one before the first step and one at the end."""
    best: Best | None = None
    """Export the best of the validations instead of the last step; ``None``: export the last."""
    seed: Seed = 0
    """The seed of every validation, so that only training changes the pictures."""
    sampling: Sampling = Sampling()
    """Steps, guidance and noise level, by stage."""

    @property
    def patience(self) -> int | None:
        """The validations without a better one after which a run stops; ``None``: it does not."""
        return self.best.patience if self.best else None

    @property
    def drawings(self) -> list[Drawing]:
        """The prompts and seeds of the pictures; the two lists are drawn one by one."""
        return [
            (prompt, self.seed + place)
            for prompts in (self.prompts, self.other_prompts)
            for place, prompt in enumerate(prompts)
        ]
