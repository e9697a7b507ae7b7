"""The ``evaluation`` section: the subject, and the scores of how well it was learnt."""

from typing import Annotated

from pydantic import Field

from adapters.cascade.sampling import Sampling
from finetune.recipe.consistency import Drawing
from finetune.recipe.schema.fields import PathText, Section, Seed
from finetune.recipe.schema.prompts import NamedPrompts, NamedStagePrompts

SEEDS_APART = 1000
"""The distance between the seeds of two pictures of one prompt, more than there are prompts."""


class Expected(Section):
    """Scores that a run on certain data should reach, measured on another machine's run."""

    data: str
    """The ``data.source`` of the measured run; runs on other data are not judged."""
    clip_i: Annotated[float, Field(gt=-1, le=1)]
    """CLIP-I, generated pictures of the subject to real ones."""
    clip_t: Annotated[float, Field(gt=-1, le=1)]
    """CLIP-T of the subject's prompts."""
    clip_t_others: Annotated[float, Field(gt=-1, le=1)] | None = None
    """CLIP-T of the other prompts; ``None`` if there are no other prompts."""
    spread: Annotated[float, Field(gt=0)]
    """The distance from these scores that other seeds or processors can make."""


class Evaluation(Section):
    """The subject, and how well it was learnt (``python -m finetune.evaluate``)."""

    identifier: str
    """The words that name the subject in prompts, such as ``sks octopus``, put in for ``{}`` there
    (:data:`finetune.recipe.prompt_lists.NAMES_IN` lists the fields)."""
    subject: str
    """The subject in plain words, which replaces ``identifier`` in the text score (CLIP-T), and is
    put in for ``{}`` in prompts of its class."""
    prompts: Annotated[NamedPrompts, Field(min_length=1)]
    """Prompts that should show the subject, in which ``{}`` is the identifier; or the name of a
    shipped list, ``objects`` or ``live``, or of a ``.txt`` file with a prompt on each line."""
    stage_2_prompts: NamedStagePrompts = None
    """Prompts for Stage II, one for each of ``prompts``, likewise, in which ``{}`` is the subject
    in plain words; ``None``: the same."""
    other_prompts: NamedPrompts = ()
    """Prompts without the subject, or the name of the list ``others``; training should not
    change their pictures."""
    class_prompts: NamedPrompts = ()
    """Prompts of the subject's class, such as ``a photo of a {}``, in which ``{}`` is the subject
    in plain words; their pictures should not show the subject (PRES). None: not scored."""
    pictures_per_prompt: Annotated[int, Field(ge=1, le=1000)] = 1
    """Pictures of each prompt, each from a seed of its own; DreamBooth takes 4."""
    clip: PathText = "openai/clip-vit-base-patch32"
    """The CLIP model that scores the pictures: a folder or hub name."""
    dino: PathText | None = None
    """The DINO or DINOv2 model that scores likeness, such as DreamBooth's ``facebook/dino-vits16``,
    or ``facebook/dinov2-small``: a folder or hub name; ``None``: not scored."""
    seed: Seed = 1000
    """The seed of the first picture, other than ``validation.seed``; every variant of the cascade
    draws from the same seeds."""
    sampling: Sampling | None = None
    """Steps, guidance and noise level, by stage; ``None``: as in validation."""
    expected: Expected | None = None
    """The scores that the run should reach; ``None``: not known."""

    def seed_of(self, place: int, number: int = 0) -> int:
        """Return the seed of a prompt's picture: the prompt's place among all, and its number."""
        return self.seed + SEEDS_APART * number + place

    @property
    def drawings(self) -> list[Drawing]:
        """The prompts and seeds of the pictures that are scored."""
        return [
            (prompt, self.seed_of(place, number))
            for number in range(self.pictures_per_prompt)
            for place, prompt in enumerate(self.prompts + self.other_prompts)
        ]
