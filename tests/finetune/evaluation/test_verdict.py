"""The verdict says in one plain sentence what the scores and their intervals allow."""

from typing import Any

import pytest

from finetune.evaluation.intervals import Score
from finetune.evaluation.results import Results
from finetune.evaluation.verdict import write_verdict

BASE = {
    "clip_i": Score(0.1, 0.05, 0.15, 12),
    "clip_t_others": Score(0.5, 0.45, 0.55, 8),
    "copied": Score(0.0, 0.0, 0.0, 12),
}
CEILING = {"clip_i": Score(0.5, 0.45, 0.55, 6)}


def score(value: float, spread: float | None, count: int = 12) -> Score:
    ends = (None, None) if spread is None else (value - spread, value + spread)
    return Score(value, *ends, count)


def results(
    learnt: float = 0.3,
    kept: float = -0.005,
    *,
    spread: float | None = 0.005,
    copied: float = 0.0,
    stages: tuple[float, ...] = (),
    **changes: Any,
) -> Results:
    """Results of a fine-tuned cascade.

    Args:
        learnt: the change of CLIP-I from the base's.
        kept: that of the CLIP-T of other prompts.
        spread: half of the width of both intervals; `None`: there are none,
            and a single picture of other things.
        copied: the share of copies.
        stages: the CLIP-I of each stage alone.
        changes: of other fields.
    """
    others = 1 if spread is None else 8
    change = {"clip_i": score(learnt, spread), "clip_t_others": score(kept, spread, others)}
    tuned = {name: score(BASE[name].value + each.value, spread) for name, each in change.items()}
    variants = {"base": BASE, "fine_tuned": tuned | {"copied": score(copied, None)}}
    variants |= {
        f"stage_{number}": {"clip_i": score(own, None)} for number, own in enumerate(stages, 1)
    }
    fields: dict[str, Any] = {
        "recipe": "small",
        "encoders": {"clip": "a"},
        "adapters": {"runs/a": 1.0},
        "variants": variants,
        "changes": {"fine_tuned": change},
        "ceiling": CEILING,
        "shots": [],
        "samples": {},
        "picture_scores": {},
        "photos": [],
    }
    return Results(**fields | changes)


def test_a_good_run_is_learnt_intact_and_no_copy() -> None:
    assert write_verdict(results()) == (
        "The subject is learnt (80 % of the likeness of real pictures, 79 to 81 %; the base reaches"
        " 20 %), other things are intact (99 % of the base's CLIP-T, 98 to 100 %), and no picture"
        " looks like a copy of a training picture."
    )


@pytest.mark.parametrize(
    ("learnt", "kept", "spread", "said"),
    [
        (0.3, -0.005, 0.0, "The subject is learnt ("),
        (0.15, -0.005, 0.01, "The subject is partly learnt ("),
        (0.04, -0.005, 0.01, "The subject is hardly learnt ("),
        (0.0, -0.005, 0.01, "The subject is not learnt ("),
        (
            -0.05,
            -0.005,
            0.01,
            "The subject is not learnt (10 % of the likeness of real pictures, 8 to 12 %;",
        ),
        (
            0.3,
            -0.005,
            0.15,
            "The subject seems learnt (80 % of the likeness of real pictures, 50 to 110 %;",
        ),
        (
            0.3,
            -0.005,
            None,
            "The subject seems learnt (80 % of the likeness of real pictures, by a single picture;",
        ),
        (0.3, 0.1, 0.01, "other things are intact (120 % of"),
        (
            0.3,
            -0.03,
            0.01,
            "other things are mostly intact (94 % of the base's CLIP-T, 92 to 96 %)",
        ),
        (
            0.3,
            -0.03,
            0.1,
            "other things seem mostly intact (94 % of the base's CLIP-T, 74 to 114 %)",
        ),
        (0.3, -0.1, 0.01, "other things are damaged (80 % of"),
        (
            0.3,
            -0.1,
            None,
            "pictures of other things are too few for a judgement (80 % of the base's CLIP-T, by a"
            " single picture)",
        ),
    ],
)
def test_a_word_holds_for_the_whole_interval_or_things_only_seem_so(
    learnt: float, kept: float, spread: float | None, said: str
) -> None:
    assert said in write_verdict(results(learnt, kept, spread=spread))


@pytest.mark.parametrize(
    ("copied", "said"),
    [
        (1 / 12, "and 1 of 12 pictures looks like a copy of training pictures."),
        (0.5, "and 6 of 12 pictures look like copies of training pictures."),
    ],
)
def test_copies_are_counted(copied: float, said: str) -> None:
    assert write_verdict(results(copied=copied)).endswith(said)


def test_copies_of_a_base_that_never_saw_the_pictures_are_said() -> None:
    base = BASE | {"copied": Score(0.25, None, None, 12)}
    found = results(copied=0.5)
    verdict = write_verdict(results(variants={**found.variants, "base": base}, copied=0.5))
    assert verdict.endswith(
        "and 6 of 12 pictures look like copies of training pictures (of the base's: 3)."
    )


def test_stages_alone_are_compared() -> None:
    verdict = write_verdict(results(stages=(0.35, 0.12)))
    assert verdict.endswith("; Stage I alone reaches 70 % and Stage II alone 24 %.")


def test_the_base_alone_has_nothing_to_judge() -> None:
    only = {"variants": {"base": BASE}, "changes": {}}
    assert write_verdict(results(**only)) == (
        "Only the base is drawn: its pictures of the subject reach 20 % of the likeness of real"
        " pictures, which adapters should raise."
    )
    assert "is 0.100." in write_verdict(results(**only, ceiling={"clip_i": None}))
    blackened = results(variants={"base": {"clip_i": None}}, changes={})
    assert "none of its pictures" in write_verdict(blackened)


def test_without_other_prompts_or_a_ceiling_the_rest_is_said() -> None:
    found = results()
    variants = {
        name: {key: each for key, each in scores.items() if key == "clip_i"}
        for name, scores in found.variants.items()
    }
    change = {"fine_tuned": {"clip_i": Score(0.3, 0.2, 0.4, 12)}}
    few = results(variants=variants, changes=change, ceiling={"clip_i": None})
    assert write_verdict(few) == (
        "The likeness to the training pictures rises, from 0.100 to 0.400."
    )
    beyond = results(variants=variants, changes=change, ceiling={"clip_i": Score(0.05, 0, 0, 6)})
    assert "rises, from 0.100 to 0.400" in write_verdict(beyond)
    unsure = {"fine_tuned": {"clip_i": Score(0.3, -0.1, 0.4, 12)}}
    verdict = write_verdict(results(variants=variants, changes=unsure, ceiling={}))
    assert "does not clearly change, from" in verdict


def test_no_share_is_given_of_a_score_below_nothing() -> None:
    base = BASE | {"clip_t_others": Score(-0.1, None, None, 8)}
    verdict = write_verdict(results(kept=-0.1, variants={**results().variants, "base": base}))
    assert "the CLIP-T of other things falls, by -0.100" in verdict


def test_the_encoder_that_tells_subjects_apart_best_is_heard() -> None:
    dino = {"dino": Score(0.2, 0.1, 0.3, 12)}
    variants = {
        "base": BASE | dino,
        "fine_tuned": {"clip_i": BASE["clip_i"], "dino": Score(0.5, 0.4, 0.6, 12)},
    }
    changes = {"fine_tuned": {"dino": Score(0.3, 0.29, 0.31, 12)}}
    ceiling = CEILING | {"dino": Score(0.6, 0.5, 0.7, 6)}
    encoders = {"clip": "a", "dino": "b"}
    found = results(variants=variants, changes=changes, ceiling=ceiling, encoders=encoders)
    assert write_verdict(found).startswith("The subject is learnt (83 % of the likeness of")
