"""The sampling settings that adapters were validated with in training."""

from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from adapters.cascade.sampling import Sampling, SettingError
from adapters.errors import UserError, print_once
from adapters.files.info import AdapterInfo

AS_TRAINED = "as_trained"
"""The name that stands for these settings where sampling settings are given."""

Loaded = tuple[str, AdapterInfo | None]
"""An adapter's name, and its description of one of its stages."""


def find_sampling(loaded: Iterable[Loaded]) -> Sampling | None:
    """Find the settings that adapters were trained with; ``None``: none of them records any.

    Each stage takes those of the first adapter of that stage, or else of the first adapter. If
    others differ, a line on standard error says so.

    Args:
        loaded: the adapters' stages, those of the first adapter first.
    """
    known = [(name, info) for name, info in loaded if info and info.sampling]
    if not known:
        return None
    settings = {}
    for number in (1, 2, 3):
        own = [each for each in known if each[1].stage == number] or known
        given = [(name, _read(name, info).of(number)) for name, info in own]
        settings[f"stage_{number}"] = given[0][1]
        differing = [name for name, each in given if each != given[0][1]]
        if differing and any(info.stage == number for _, info in own):
            _say_difference(number, given[0][0], differing)
    return Sampling.model_validate(settings)


def _read(name: str, info: AdapterInfo) -> Sampling:
    try:
        return Sampling.model_validate(info.sampling)
    except ValidationError as error:
        raise UserError(
            f"The sampling settings that the adapter {name} records cannot be used"
            f" ({SettingError(error)}) Give settings of your own."
        ) from None


def _say_difference(stage: int, first: str, others: Sequence[str]) -> None:
    names = ", ".join(dict.fromkeys(others))
    print_once(
        f"Stage {'I' * stage} is drawn with the settings that {first} was trained with, which"
        f" differ from those of {names}."
    )
