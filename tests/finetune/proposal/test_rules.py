"""The table of settings to start from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune.data.pictures import Picture
from finetune.proposal.recipe_text import Answers, propose
from finetune.proposal.rules import RULES, Case, choose_settings
from finetune.proposal.survey import Survey
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe

CASES = {
    "dog on 24 GB": Case(pictures=5, captioned=False, subject="dog", alive=True, memory_gb=24),
    "vase on 8 GB": Case(pictures=5, captioned=False, subject="vase", memory_gb=8),
    "dog on 6 GB": Case(pictures=5, captioned=True, subject="dog", alive=True, memory_gb=6),
    "dog on 4 GB": Case(pictures=5, captioned=True, subject="dog", alive=True, memory_gb=4),
    "style on 24 GB": Case(pictures=500, captioned=True, subject=None, memory_gb=24),
    "style on 8 GB": Case(pictures=500, captioned=True, subject=None, memory_gb=8),
    "embedded dog": Case(pictures=5, captioned=False, subject="dog", embedded=True),
    "embedded style": Case(pictures=50, captioned=True, subject=None, embedded=True),
}


def survey_of(*captions: str) -> Survey:
    pictures = [Picture(Path("x.npy"), caption, f"{n}.png") for n, caption in enumerate(captions)]
    return Survey(Path("photos"), pictures, [(512, 512)] * len(captions), captions[0] != "none")


def propose_for(case: Case) -> Recipe:
    captions = ["a sks dog" if case.captioned else "none"] * case.pictures
    answers = Answers(
        subject=case.subject,
        alive=case.alive,
        memory_gb=case.memory_gb,
        base="models/if-tiny" if case.embedded else None,
        is_small=case.embedded,
    )
    return propose(survey_of(*captions), answers).recipe


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_case_is_a_valid_recipe(case: Case) -> None:
    recipe = propose_for(case)
    assert [stage.number for stage in recipe.trained] == [1, 2]
    assert recipe.validation.prompts
    assert (recipe.evaluation is None) == (case.subject is None)
    assert recipe.prior is None or recipe.prior.kind == "output"


def test_a_subject_gets_the_settings_of_the_shipped_recipe() -> None:
    shipped = load_recipe("recipes/dreambooth_cascade.yaml")
    chosen = propose_for(CASES["dog on 24 GB"])
    assert (chosen.stage_1, chosen.stage_2) == (shipped.stage_1, shipped.stage_2)
    assert chosen.base == shipped.base


def test_the_embedded_cascade_gets_those_of_the_quickstart() -> None:
    shipped = load_recipe("recipes/quickstart.yaml")
    chosen = propose_for(CASES["embedded dog"])
    for section in ("base", "prior", "stage_1", "stage_2"):
        assert dict(chosen)[section] == dict(shipped)[section], section
    assert chosen.validation.sampling == shipped.validation.sampling


def test_prompts_suit_the_kind_of_subject() -> None:
    living, thing = propose_for(CASES["dog on 24 GB"]), propose_for(CASES["vase on 8 GB"])
    assert living.evaluation is not None
    assert thing.evaluation is not None
    assert any("wearing" in prompt for prompt in living.evaluation.prompts)
    assert not any("wearing" in prompt for prompt in thing.evaluation.prompts)
    assert all("sks vase" in prompt for prompt in thing.evaluation.prompts)


@pytest.mark.parametrize(
    ("captions", "one_for_all"),
    [
        (["none"], "a photo of a {}"),
        (["a sks dog at sea", "a sks dog"], None),
        (["a dog at sea"], "a photo of a {}"),
    ],
)
def test_captions_that_do_not_name_the_subject_are_not_trained_on(
    captions: list[str], one_for_all: str | None
) -> None:
    proposal = propose(survey_of(*captions), Answers(subject="dog"))
    assert proposal.tree["data"].get("prompt") == one_for_all
    explained = any("none of the pictures' own" in reason for reason in proposal.reasons)
    assert explained == (captions == ["a dog at sea"])
    own = propose(survey_of("a zwx dog"), Answers(subject="dog", identifier="zwx dog"))
    assert "prompt" not in own.tree["data"]


def test_rules_are_not_changed_by_what_is_made_of_them() -> None:
    def flat(tree: Mapping[str, Any]) -> str:
        return repr(tree)

    before = flat({str(number): rule.settings for number, rule in enumerate(RULES)})
    for case in CASES.values():
        propose_for(case)
        choose_settings(case)
    assert flat({str(number): rule.settings for number, rule in enumerate(RULES)}) == before
