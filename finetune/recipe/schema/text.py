"""The ``text`` section: the text encoder."""

from typing import TYPE_CHECKING, Literal

from finetune.recipe.schema.fields import ChosenPrecision, Section, resolve_precision
from unets.precision import Precision

if TYPE_CHECKING:  # so that mistakes are reported without this slow import
    import torch


class Text(Section):
    """The text encoder: its precision, its device, and the cleaning of its captions."""

    precision: ChosenPrecision = "auto"
    """The precision of the text encoder's weights; ``auto``: bf16 on a GPU, fp32 on a CPU."""
    device: Literal["auto", "cpu"] = "auto"
    """The device that encodes captions; ``auto``: the training device."""
    clean_caption: bool = True
    """Clean captions as IF's pipelines do by default. This removes HTML, links and odd
    punctuation, but also words such as ``<sks>``, ``j0hn``, ``#3``, ``@mydog``, and all Chinese."""

    def precision_on(self, device: "torch.device") -> Precision:
        """Return the precision of the text encoder on the device that encodes."""
        return resolve_precision(self.precision, device)
