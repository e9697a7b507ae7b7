"""The verdict on an evaluation, in one sentence: what is learnt, kept and copied."""

from collections.abc import Sequence

from finetune.evaluation.drawing import BASE, FINE_TUNED
from finetune.evaluation.intervals import Score
from finetune.evaluation.results import VARIANTS, Results
from finetune.evaluation.scoring import LIKENESS, choose_judge
from finetune.run.chance import LEAST_PICTURES

LEARNT = ((0.5, "learnt"), (0.2, "partly learnt"), (0.05, "hardly learnt"))
"""Words for the part of the way from the base's likeness to the ceiling, each from a bound on."""

KEPT = ((0.97, "intact"), (0.9, "mostly intact"))
"""Words for the share of the base's CLIP-T of other prompts that is kept, likewise."""


def write_verdict(report: Results) -> str:
    """Say in one sentence if the subject is learnt, if other things are intact, and what is copied.

    A word holds where the whole interval deserves it; otherwise things only seem so.
    """
    if FINE_TUNED not in report.variants:
        return _describe_base(report)
    clauses = [_judge_subject(report), _judge_others(report), _judge_copies(report)]
    sentence = _join([clause for clause in clauses if clause]) + _compare_stages(report)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _describe_base(report: Results) -> str:
    score, ceiling = report.variants[BASE].get(_likeness(report)), _ceiling(report)
    drawn = "Only the base is drawn"
    if score is None:
        return f"{drawn}, and none of its pictures of the subject could be scored."
    if ceiling is None:
        return (
            f"{drawn}: the likeness of its pictures to the training pictures is {score.value:.3f}."
        )
    return (
        f"{drawn}: its pictures of the subject reach {_percent(score.value / ceiling)} of the"
        " likeness of real pictures, which adapters should raise."
    )


def _judge_subject(report: Results) -> str:
    """Judge the likeness of the subject's pictures, between the base's and the ceiling."""
    name, ceiling = _likeness(report), _ceiling(report)
    base, tuned = (report.variants[variant].get(name) for variant in (BASE, FINE_TUNED))
    change = report.changes[FINE_TUNED].get(name)
    if base is None or tuned is None or change is None:
        return "no picture of the subject could be scored"
    if ceiling is None or ceiling <= base.value:  # there is no way to go a part of
        return (
            f"the likeness to the training pictures {_move(change)}, from {base.value:.3f} to"
            f" {tuned.value:.3f}"
        )
    way = ceiling - base.value
    word, certain = _weigh(change, 0.0, way, LEARNT, "not learnt")
    return (
        f"the subject {'is' if certain else 'seems'} {word}"
        f" ({_share(tuned, 0.0, ceiling, 'the likeness of real pictures')}; the base reaches"
        f" {_percent(base.value / ceiling)})"
    )


def _judge_others(report: Results) -> str:
    """Judge the CLIP-T of other prompts by the base's; empty: there are no such prompts."""
    base = report.variants[BASE].get("clip_t_others")
    change = report.changes[FINE_TUNED].get("clip_t_others")
    if base is None or change is None:
        return ""
    if base.value <= 0:  # a cosine, of which there are no shares then
        return f"the CLIP-T of other things {_move(change)}, by {change.value:+.3f}"
    share = _share(change, base.value, base.value, "the base's CLIP-T")
    if change.count < LEAST_PICTURES:
        return f"pictures of other things are too few for a judgement ({share})"
    word, certain = _weigh(change, base.value, base.value, KEPT, "damaged")
    return f"other things {'are' if certain else 'seem'} {word} ({share})"


def _judge_copies(report: Results) -> str:
    """Count the pictures that are nearer to a training picture than real pictures are."""
    base, tuned = (report.variants[variant].get("copied") for variant in (BASE, FINE_TUNED))
    if tuned is None:
        return ""
    count = round(tuned.value * tuned.count)
    if count == 0:
        return "no picture looks like a copy of a training picture"
    verb, copies = ("looks", "a copy") if count == 1 else ("look", "copies")
    already = round(base.value * base.count) if base else 0
    note = f" (of the base's: {already})" * (already > 0)
    return f"{count} of {tuned.count} pictures {verb} like {copies} of training pictures{note}"


def _compare_stages(report: Results) -> str:
    """Give the likeness that each stage's adapters reach alone."""
    ceiling, parts = _ceiling(report), list[str]()
    for variant in report.variants:
        score = report.variants[variant].get(_likeness(report))
        if variant not in (BASE, FINE_TUNED) and score is not None and ceiling is not None:
            verb = " reaches" * (not parts)
            parts.append(f"{VARIANTS[variant]}{verb} {_percent(score.value / ceiling)}")
    return f"; {_join(parts)}" if parts else ""


def _likeness(report: Results) -> str:
    return LIKENESS[choose_judge(report.encoders)]


def _ceiling(report: Results) -> float | None:
    """Return the likeness of real pictures; ``None``: there are no shares of it."""
    score = report.ceiling.get(_likeness(report))
    return None if score is None or score.value <= 0 else score.value


def _weigh(
    change: Score, start: float, whole: float, words: Sequence[tuple[float, str]], last: str
) -> tuple[str, bool]:
    """Choose the word for a change on top of a start, as a part of a whole.

    Returns:
        The word, and whether both ends of the interval deserve it too.
    """

    def choose(value: float) -> str:
        return next((word for bound, word in words if (start + value) / whole >= bound), last)

    word = choose(change.value)
    ends = [end for end in (change.low, change.high) if end is not None]
    return word, bool(ends) and all(choose(end) == word for end in ends)


def _share(score: Score, start: float, whole: float, title: str) -> str:
    """Format a score on top of a start as a share of a whole, with its interval."""
    share = f"{_percent((start + score.value) / whole)} of {title}"
    if score.low is None or score.high is None:
        return f"{share}, by a single picture"
    low, high = ((start + end) / whole for end in (score.low, score.high))
    return f"{share}, {100 * low:.0f} to {_percent(high)}"


def _move(change: Score) -> str:
    """Say where a score goes, if its interval tells."""
    if change.low is not None and change.low > 0:
        return "rises"
    return "falls" if change.high is not None and change.high < 0 else "does not clearly change"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"


def _join(clauses: Sequence[str]) -> str:
    """Join clauses with commas and ``and``."""
    *first, last = clauses
    if not first:
        return last
    return f"{', '.join(first)}{',' * (len(first) > 1)} and {last}"
