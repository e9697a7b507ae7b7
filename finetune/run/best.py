"""The best of a run's validations, which is exported."""

import math
from collections.abc import Sequence

from finetune.recipe.schema import Best
from finetune.run.chance import LEAST_PICTURES, is_certain
from finetune.run.figures import CLIP_I, CLIP_T, HELD_OUT, OTHERS_CLIP_T, Validated

TAGS = {"clip_i": (CLIP_I, 1), "clip_t": (CLIP_T, 1), "held_out": (HELD_OUT, -1)}
"""The tag of each figure to judge by, and the sign that makes more of it better."""


def choose(history: Sequence[Validated], best: Best) -> Validated | None:
    """Choose the validation to export: the latest that is not worse than the best but by chance.

    Pictures differ from step to step, so the best of many validations is partly luck, while later
    steps have seen more and end at a lower learning rate. Each further validation either becomes
    the choice or leaves it as it was.

    Returns:
        The validation; ``None``: there is no candidate.
    """
    peak = find_best(history, best)
    if peak is None:
        return None
    later = [each for each in history if each.step > peak.step]
    return next(
        (
            each
            for each in reversed(later)
            if is_measured(each, history[0], best) and not _is_worse(each, peak, history[0], best)
        ),
        peak,
    )


def find_best(history: Sequence[Validated], best: Best) -> Validated | None:
    """Find the best validation: of those that keep the bound, the one with the best figure.

    If none keeps the bound, it is the one that comes closest to it. The first validation is the
    base's and no candidate, and neither is one whose figure or share was not measured. The earliest
    of equals is the best.

    Returns:
        The validation; ``None``: there is no candidate.
    """
    candidates = [each for each in history[1:] if is_measured(each, history[0], best)]
    return max(candidates, key=lambda each: _rank(each, history[0], best), default=None)


def _is_worse(validated: Validated, peak: Validated, first: Validated, best: Best) -> bool:
    """Tell whether a validation falls short of the best, in what that is best in, beyond chance."""
    judged_by = [TAGS[best.figure]] if keeps_bound(peak, first, best) else []
    if not keeps_bound(validated, first, best):
        judged_by.append((OTHERS_CLIP_T, 1))
    return any(
        sign * validated.figures[tag] < sign * peak.figures[tag]
        and is_certain(peak, validated, tag)
        for tag, sign in judged_by
    )


def kept_share(validated: Validated, first: Validated) -> float:
    """Return the share of the base's CLIP-T of other prompts that is left; NaN: not measured.

    A CLIP-T is a cosine; where the base's is 0 or less, there are no shares of it.
    """
    base = first.figures.get(OTHERS_CLIP_T, math.nan)
    return validated.figures.get(OTHERS_CLIP_T, math.nan) / base if base > 0 else math.nan


def is_measured(validated: Validated, first: Validated, best: Best) -> bool:
    """Tell whether a validation has all that it is judged by."""
    judged_by = [_figure(validated, best)]
    if best.keep_others is not None:
        judged_by.append(kept_share(validated, first))
    return not any(map(math.isnan, judged_by))


def keeps_bound(validated: Validated, first: Validated, best: Best) -> bool:
    """Tell whether a validation keeps the bound on forgetting; one not measured does not."""
    return best.keep_others is None or kept_share(validated, first) >= best.keep_others


def _figure(validated: Validated, best: Best) -> float:
    """Return the figure to judge a validation by; NaN: not measured."""
    tag, _ = TAGS[best.figure]
    return validated.figures.get(tag, math.nan)


def _rank(validated: Validated, first: Validated, best: Best) -> tuple[bool, float]:
    _, sign = TAGS[best.figure]
    if keeps_bound(validated, first, best):
        return True, sign * _figure(validated, best)
    return False, kept_share(validated, first)


def has_stalled(history: Sequence[Validated], best: Best) -> bool:
    """Tell whether the last ``patience`` validations have all been no better than one before."""
    peak = find_best(history, best)
    if best.patience is None or peak is None:
        return False
    since = sum(each.step > peak.step for each in history)
    return since >= best.patience


def explain(history: Sequence[Validated], best: Best, *, stopped_early: bool) -> str:
    """Say in a few sentences which validation was chosen, and why; or why none was."""
    chosen, peak = choose(history, best), find_best(history, best)
    if chosen is None or peak is None:
        return f"{_explain_unmeasured(history, best)}, so the last step is exported."
    last = history[-1].step
    ending = "the run stopped early at" if stopped_early else "the run went on to"
    when = f"step {peak.step}" + (f" ({ending} step {last})" if last > peak.step else "")
    value = f"{best.figure} is {_figure(peak, best):.4f}"
    if best.keep_others is None:
        sentence = f"The best validation is that of {when}: {value}."
    else:
        share = f"other prompts keep {kept_share(peak, history[0]):.1%} of the base's CLIP-T"
        sentence = (
            f"The best validation is that of {when}: {value}, and {share}."
            if keeps_bound(peak, history[0], best)
            else f"No validation kept {best.keep_others:.0%} of the base's CLIP-T of other prompts;"
            f" that of {when} came closest: {share}, and {value}."
        )
    if chosen is peak:
        return sentence
    return f"{sentence} {_explain_later(chosen, best)}"


def _explain_later(chosen: Validated, best: Best) -> str:
    """Say why a later validation than the best is exported."""
    tag, _ = TAGS[best.figure]
    count = len(chosen.by_picture.get(tag, ()))
    why = (
        f"of {count} pictures no difference is certain, only of {LEAST_PICTURES} or more"
        if count < LEAST_PICTURES
        else "it is not worse by more than chance"
    )
    value = f"{best.figure} is {_figure(chosen, best):.4f}"
    return f"The later step {chosen.step} ({value}) is exported, as {why}."


def _explain_unmeasured(history: Sequence[Validated], best: Best) -> str:
    """Say why no validation can be judged."""
    base = history[0].figures.get(OTHERS_CLIP_T, math.nan)
    if best.keep_others is not None and base <= 0:
        return (
            f"The base's CLIP-T of other prompts is {base:.4f}, of which no share can be kept:"
            " validation.best.keep_others cannot be judged"
        )
    others = "" if best.keep_others is None else " with the CLIP-T of other prompts"
    return f"No validation has a measured {best.figure}{others}"
