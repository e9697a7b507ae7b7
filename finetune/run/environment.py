"""The variables of the environment that make several processes one run, checked before they do."""

from collections.abc import Mapping

from adapters.errors import UserError, quote

LAUNCH = "start with accelerate launch, or unset it"
"""The advice on variables that a launcher would have set together."""

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
"""The variables that are whole numbers."""

MOST_PROCESSES = 100_000
"""The most processes, or ports, that a variable may say."""

PLACES = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}
"""The variables that number a process, with those that say how many there are."""

TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables that a process with a ``LOCAL_RANK`` needs."""


def check_environment(variables: Mapping[str, str]) -> None:
    """Check the variables that a launcher sets for each of its processes.

    Raises:
        UserError: if one is no number, or some are there without the others.
    """
    given = {name: _read(name, variables[name]) for name in NUMBERS if name in variables}
    if given.get("LOCAL_RANK") == -1:  # says that there is one process
        del given["LOCAL_RANK"]
    for place, total in PLACES.items():
        total = total if total in given else "WORLD_SIZE"  # not all launchers set the local one
        if place in given and not 0 <= given[place] < given.get(total, 1):
            size = f"{total} is {given[total]}" if total in given else f"{total} is not set"
            raise UserError(f"{place} in the environment is {given[place]}, but {size}: {LAUNCH}.")
    several = given.get("WORLD_SIZE", 1) > 1
    if several and "LOCAL_RANK" not in given:
        raise UserError(
            f"WORLD_SIZE in the environment is {given['WORLD_SIZE']}, but LOCAL_RANK is not set:"
            f" {LAUNCH}."
        )
    for name in TOGETHER if "LOCAL_RANK" in given else ():
        if name not in variables:
            raise UserError(
                f"LOCAL_RANK in the environment is {given['LOCAL_RANK']}, but {name} is not set:"
                f" {LAUNCH}."
            )


def _read(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = MOST_PROCESSES + 1
    if not -1 <= number <= MOST_PROCESSES:
        raise UserError(
            f"{name} in the environment must be a whole number (got {quote(text)}): {LAUNCH}."
        )
    return number
