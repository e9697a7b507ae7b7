"""Recipes of published cascades whose gated files are not on this machine."""

from adapters.base.published import PublishedSource, find_sizes
from adapters.base.source import Source
from finetune.recipe.schema import Recipe
from finetune.recipe.schema.base import Base
from finetune.step.stages import STAGES, Stage


class SizedBase(Base):
    """A cascade of which, where the files cannot be read, the published sizes are known."""

    def source(self, stage: Stage) -> Source:
        """Return the source of a stage's model, or the stand-in of its size."""
        return find_sizes(super().source(stage))


def use_published_sizes(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Let a recipe be estimated without the files of a published base.

    Returns:
        The recipe, and the names of the models of which the published sizes are used.

    Raises:
        UserError: if another base's configuration cannot be read.
    """
    sized = recipe.model_copy(update={"base": SizedBase(**dict(recipe.base))})
    above = {STAGES[2]} if recipe.shows_stage_2 else set()
    sources = [sized.source(stage) for stage in dict.fromkeys((STAGES[1], *recipe.trained, *above))]
    unread = [source.name for source in sources if isinstance(source, PublishedSource)]
    return (sized, unread) if unread else (recipe, [])
