"""The ``prior`` section: two kinds of prior preservation."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from adapters.cascade.sampling import Sampling
from finetune.recipe.prompt_lists import read_prompts
from finetune.recipe.schema.fields import PathText, PositiveFactor, Section, Share
from finetune.recipe.schema.prompts import Prompts


class Preservation(Section):
    """The settings that both kinds of prior preservation have."""

    kind: str
    """The kind: ``pictures`` or ``output``."""
    share: Share
    """The share of preserved pictures in each optimizer step, over all processes and accumulated
    batches: at least one picture, never all."""
    weight: PositiveFactor = 1.0
    """The weight of the preserved pictures' mean loss, relative to the subject's."""
    caption_dropout: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of preserved pictures captioned with the empty caption, whatever
    ``data.caption_dropout`` is. It is above zero so that the empty caption, from which guidance
    leads away, is preserved too."""

    def count_in(self, global_size: int) -> int:
        """Return the number of preserved pictures among those of an optimizer step."""
        return min(max(round(global_size * self.share), 1), global_size - 1)


class PicturePrior(Preservation):
    """Prior preservation by pictures of the subject's class, which are trained on beside it."""

    kind: Literal["pictures"] = "pictures"
    """``pictures``; this kind if the field is left out."""
    prompts: Annotated[Prompts, Field(min_length=1)]
    """Prompts of the class pictures, used in rotation, and their captions; ``{}`` is
    ``evaluation.subject``."""
    count: Annotated[int, Field(ge=1, le=100_000)] = 100
    """The number of class pictures."""
    folder: PathText | None = None
    """A folder of class pictures to use instead of sampling them from the base cascade."""
    share: Share = 0.5
    """The share of class pictures in each optimizer step, as in either kind."""
    sampling: Sampling = Sampling()
    """Steps, guidance and noise level for the class pictures, by stage."""


def _read_own_list(prompts: Any) -> Any:
    """Read a user's own list of prompts, and leave the names of shipped ones as they are."""
    own = isinstance(prompts, str) and prompts.endswith(".txt")
    return list(read_prompts(prompts)) if own else prompts


class OutputPrior(Preservation):
    """Prior preservation by the base's own predictions, which need no class pictures.

    The pictures are the training data's with other captions, and the target is what the base
    predicts for them without the adapter, so that each of these captions goes on meaning the same.
    """

    kind: Literal["output"]
    """``output``."""
    prompts: Annotated[
        Annotated[Prompts, Field(min_length=1)] | Literal["everyday", "data"],
        BeforeValidator(_read_own_list),
    ]
    """The captions to preserve, in random order: a list, in which ``{}`` is
    ``evaluation.subject``; the name of a ``.txt`` file with a caption on each line; ``everyday``,
    for the captions of everyday things in ``finetune/recipe/prompts/everyday.txt``; or ``data``,
    for the training data's own, which holds back what is learnt of them."""
    share: Share = 0.25
    """The share of preserved pictures in each optimizer step, as in either kind."""

    def list_captions(self, of_data: Iterable[str] = ()) -> tuple[str, ...]:
        """List the distinct captions to preserve, given those of the training data."""
        if self.prompts == "data":
            return tuple(dict.fromkeys(of_data))
        return read_prompts(self.prompts) if isinstance(self.prompts, str) else self.prompts


def _prior_kind(prior: Any) -> str:
    """Return the kind of a section of prior preservation; ``pictures`` if it does not say."""
    if isinstance(prior, PicturePrior | OutputPrior):
        return prior.kind
    return str(prior.get("kind", "pictures")) if isinstance(prior, dict) else "pictures"


Prior = Annotated[
    Annotated[PicturePrior, Tag("pictures")] | Annotated[OutputPrior, Tag("output")],
    Discriminator(_prior_kind),
]
"""Either kind of prior preservation, told apart by ``kind``."""
