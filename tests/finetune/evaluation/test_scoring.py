"""Every score of an evaluation, computed again from the vectors in plain numpy."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.evaluation.drawing import Group, Shot
from finetune.evaluation.intervals import Score
from finetune.evaluation.scoring import TITLES, Measured, Scores, Yardstick, changes

GROUPS: list[Group] = ["subject", "subject", "others", "class"]
"""The groups of the prompts, of each of which there are three pictures."""


def units(count: int, seed: int, width: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=draw), dim=-1)


SHOTS = tuple(
    Shot(group, place, number, f"prompt {place}", f"prompt {place}", f"text {place}", number)
    for number in range(3)
    for place, group in enumerate(GROUPS)
)
REAL = {"clip": units(4, 0), "dino": units(4, 1, 5)}
TEXTS = units(len(SHOTS), 2)
DRAWN = {"clip": units(len(SHOTS), 3), "dino": units(len(SHOTS), 4, 5)}
REFERENCE = units(20, 5)
NONE = [False] * len(SHOTS)


def value(scores: Scores, name: str) -> float:
    score = scores[name]
    assert score is not None
    return score.value


def measure(missing: list[bool] = NONE, *encoders: str) -> Measured:
    names = encoders or ("clip", "dino")
    yardstick = Yardstick({name: REAL[name] for name in names}, TEXTS, SHOTS, REFERENCE)
    return yardstick.measure({name: DRAWN[name] for name in names}, missing)


@pytest.mark.parametrize("judge", ["clip", "dino"])
def test_scores_are_those_of_the_protocol(judge: str) -> None:
    scores = measure(NONE, *dict.fromkeys(["clip", judge])).scores
    rows = {g: [n for n, s in enumerate(SHOTS) if s.group == g] for g in set(GROUPS)}
    real = {name: vectors.double().numpy() for name, vectors in REAL.items()}
    drawn = {name: vectors.double().numpy() for name, vectors in DRAWN.items()}
    cosines = {name: drawn[name] @ real[name].T for name in real}
    own = (drawn["clip"] * TEXTS.double().numpy()).sum(-1)
    among = [a @ b for a, b in combinations(real[judge], 2)]
    apart = [
        1 - drawn[judge][one] @ drawn[judge][other]
        for one, other in combinations(rows["subject"], 2)
        if SHOTS[one].place == SHOTS[other].place
    ]
    nearest = cosines[judge][rows["subject"]].max(1)
    wanted = {
        "clip_i": cosines["clip"][rows["subject"]].mean(),
        "clip_t": own[rows["subject"]].mean(),
        "clip_t_others": own[rows["others"]].mean(),
        "div": np.mean(apart),
        "pres": cosines[judge][rows["class"]].mean(),
        "nearest": nearest.mean(),
        "copied": (nearest > max(among)).mean(),
    }
    if judge == "dino":
        wanted["dino"] = cosines["dino"][rows["subject"]].mean()
    for name, number in wanted.items():
        assert value(scores, name) == pytest.approx(number, rel=1e-9), name
    assert set(scores) == set(TITLES)
    assert {name for name in TITLES if scores[name] is None} == {"dino"} - set(wanted)
    assert scores["clip_i"] != scores["dino"]


def test_the_ceiling_is_real_to_real() -> None:
    ceiling = Yardstick(REAL, TEXTS, SHOTS).ceiling()
    for name, encoder in (("clip_i", "clip"), ("dino", "dino")):
        real = REAL[encoder].double().numpy()
        pairs = [a @ b for a, b in combinations(real, 2)]
        assert value(ceiling, name) == pytest.approx(np.mean(pairs))
    assert value(ceiling, "nearest") > value(ceiling, "dino")
    alone = Yardstick({"clip": REAL["clip"][:1]}, TEXTS, SHOTS)
    assert set(alone.ceiling().values()) == {None}
    assert alone.measure({"clip": DRAWN["clip"]}, NONE).scores["copied"] is None


def test_a_training_picture_drawn_again_is_found() -> None:
    vectors = {name: drawn.clone() for name, drawn in DRAWN.items()}
    for name in vectors:
        vectors[name][0] = REAL[name][2]
    found = Yardstick(REAL, TEXTS, SHOTS).measure(vectors, NONE)
    assert found.pictures[0].nearest == 2
    assert found.pictures[0].similarity == pytest.approx(1)
    assert value(found.scores, "copied") >= 1 / 6


def test_blackened_pictures_are_not_scored() -> None:
    missing = [shot.number == 0 and shot.place == 0 for shot in SHOTS]
    scores = measure(missing).scores
    for name in ("clip_i", "clip_t", "nearest", "copied", "frechet"):
        score = scores[name]
        assert score is not None
        assert score.count == 5
    assert scores["clip_i"] != measure().scores["clip_i"]
    assert scores["clip_t_others"] == measure().scores["clip_t_others"]
    everything = measure([True] * len(SHOTS)).scores
    assert set(everything.values()) == {None}


def test_scores_without_their_prompts_are_not_defined() -> None:
    shots = [shot for shot in SHOTS if shot.group == "subject" and shot.number == 0]
    kept = [SHOTS.index(shot) for shot in shots]
    yardstick = Yardstick({"clip": REAL["clip"]}, TEXTS[kept], shots)
    scores = yardstick.measure({"clip": DRAWN["clip"][kept]}, [False] * 2).scores
    undefined = {name for name, score in scores.items() if score is None}
    assert undefined == {"dino", "clip_t_others", "div", "pres", "frechet"}


def test_a_change_is_of_pairs() -> None:
    """Prompts differ far more than variants do, and do not widen the interval of the change."""
    base = Yardstick(REAL, TEXTS, SHOTS)
    better = {name: vectors + 0.05 * REAL[name].mean(0) for name, vectors in DRAWN.items()}
    variants = {"base": base.measure(DRAWN, NONE), "fine_tuned": base.measure(better, NONE)}
    (found,) = changes(variants).values()
    change, before = found["clip_i"], variants["base"].scores["clip_i"]
    assert isinstance(change, Score)
    assert isinstance(before, Score)
    assert change.value == pytest.approx(
        value(variants["fine_tuned"].scores, "clip_i") - before.value
    )
    assert change.low is not None
    assert change.high is not None
    assert before.low is not None
    assert before.high is not None
    assert change.high - change.low < 0.1 * (before.high - before.low)
