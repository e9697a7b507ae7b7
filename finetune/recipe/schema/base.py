"""The ``base`` section: the cascade to fine-tune."""

from typing import TYPE_CHECKING

from finetune.recipe.schema.fields import PathText, Section
from finetune.step.stages import Stage

if TYPE_CHECKING:  # so that mistakes are reported without this slow import
    from adapters.base.source import Source


class Base(Section):
    """The cascade to fine-tune: folders or hub names (``owner/name@revision``) for diffusers."""

    stage_1: PathText
    """Stage I; the whole cascade uses its text encoder and tokenizer."""
    stage_2: PathText | None = None
    """Stage II; needed to train it, and used for validation pictures if given."""
    stage_3: PathText | None = None
    """The x4 upscaler, for pictures only."""
    revision: str | None = None
    """The hub revision of Stages I and II if their names have none; ``None``: the newest."""
    variant: str | None = None
    """The weights' variant, such as ``fp16``, for components with it; ``None``: plain files."""

    def source(self, stage: Stage) -> "Source":
        """Return the source of a stage's model."""
        from adapters.base.source import Source

        name = {1: self.stage_1, 2: self.stage_2}[stage.number]
        assert name is not None
        return Source(name, stage.number, self.revision, self.variant)
