"""The stages of the cascade that can be trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Stage:
    """One stage of the cascade."""

    number: int
    schedulers: tuple[str, ...]
    """The pipeline's scheduler components: the picture's, then the low-res picture's."""

    @property
    def name(self) -> str:
        """``stage_1`` or ``stage_2``, as in recipes and in an exported folder."""
        return f"stage_{self.number}"

    @property
    def super_resolution(self) -> bool:
        """True if the UNet is also shown a low-res picture."""
        return len(self.schedulers) > 1


STAGES: Mapping[int, Stage] = MappingProxyType(
    {
        1: Stage(1, ("scheduler",)),
        2: Stage(2, ("scheduler", "image_noising_scheduler")),
    }
)
