"""Lists of prompts: shipped ones by name, and a user's own files."""

import json
from pathlib import Path

import pytest

from adapters.errors import UserError
from adapters.texts import check_captions
from finetune.data.captions import collect_prompts
from finetune.recipe.file import load_recipe
from finetune.recipe.prompt_lists import LISTS, SUBJECT, read_prompts
from finetune.recipe.schema import Evaluation, OutputPrior
from tests.builders import ROOT
from tests.builders.recipes import SMALL, write

SUBJECT_OF = "\nevaluation: {identifier: sks cat, subject: cat, prompts: live"


def evaluation_of(folder: Path, keys: str = "") -> Evaluation:
    recipe = load_recipe(write(folder, f"{SMALL}{SUBJECT_OF}{keys}}}"))
    assert recipe.evaluation is not None
    return recipe.evaluation


@pytest.mark.parametrize("name", ["objects", "live"])
def test_there_are_25_prompts_of_a_subject(name: str) -> None:
    prompts = read_prompts(name)
    assert len(set(prompts)) == 25
    assert all(prompt.count(SUBJECT) == 1 for prompt in prompts)
    check_captions(dict.fromkeys(prompts, name), clean_caption=True, setting="none")


def test_there_are_eight_prompts_or_more_of_other_things() -> None:
    prompts = read_prompts("others")
    assert len(set(prompts)) >= 8
    assert SUBJECT not in "".join(prompts)
    assert not {*prompts} & {*read_prompts("objects"), *read_prompts("live")}
    preserved = read_prompts("everyday")
    assert not {*prompts} & {*preserved}  # or forgetting would be measured on what is preserved
    assert set(LISTS) == {"everyday", "live", "objects", "others"}


def test_a_list_is_filled_in_with_the_subject(tmp_path: Path) -> None:
    settings = evaluation_of(
        tmp_path, ", stage_2_prompts: live, other_prompts: others, class_prompts: ['a {}']"
    )
    assert settings.prompts == tuple(p.replace("{}", "sks cat") for p in read_prompts("live"))
    assert settings.stage_2_prompts == tuple(p.replace("{}", "cat") for p in read_prompts("live"))
    assert settings.other_prompts == read_prompts("others")
    assert settings.class_prompts == ("a cat",)


def test_the_subject_is_named_in_one_place(tmp_path: Path) -> None:
    keys = (
        "validation:\n"
        "  {prompts: ['a {} at sea'], stage_2_prompts: ['a {}'], other_prompts: [a dog]}\n"
        "prior: {prompts: ['a photo of a {}']}"
    )
    path = write(tmp_path, f"{SMALL}{keys}{SUBJECT_OF}}}")
    named = ["evaluation.identifier=zwx fox", "evaluation.subject=fox", "data.prompt=one {}"]
    recipe = load_recipe(path, named)
    assert recipe.data.prompt == "one zwx fox"
    assert recipe.class_pictures is not None
    assert recipe.class_pictures.prompts == ("a photo of a fox",)
    assert recipe.validation.prompts == ("a zwx fox at sea",)
    assert recipe.validation.stage_2_prompts == ("a fox",)
    assert recipe.validation.other_prompts == ("a dog",)
    assert recipe.evaluation is not None
    assert recipe.evaluation.prompts[0].startswith("a zwx fox ")
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    preserved = load_recipe(path, ["prior={kind: output, prompts: ['a {}', a cat]}"])
    assert isinstance(preserved.prior, OutputPrior)
    assert preserved.prior.list_captions() == ("a fox", "a cat")


def test_a_prompt_of_a_subject_without_a_name_is_a_mistake(tmp_path: Path) -> None:
    keys = "validation: {prompts: ['a {}']}\nprior: {prompts: ['a {}']}\n"
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, SMALL + keys), ["data.prompt=a {}"])
    assert [row.strip() for row in str(caught.value).splitlines()[1:]] == [
        "data.prompt: {} is evaluation.identifier: give that, or write it out",
        "prior.prompts: {} is evaluation.subject: give that, or write it out",
        "validation.prompts: {} is evaluation.identifier: give that, or write it out",
    ]


@pytest.mark.parametrize("subject", ["robot", "alarm clock", "pineapple"])
@pytest.mark.parametrize("path", ["quickstart", "dreambooth_cascade"])
def test_three_overrides_name_another_subject(path: str, subject: str) -> None:
    folder = ROOT / "datasets" / subject.replace(" ", "_")
    recipe = load_recipe(
        ROOT / f"recipes/{path}.yaml",
        [
            f"data.source={folder}",
            f"evaluation.identifier=sks {subject}",
            f"evaluation.subject={subject}",
        ],
    )
    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").open()]
    own = [caption for caption in collect_prompts(recipe) if f"sks {subject}" in caption]
    assert all(f"sks {subject}" in caption for caption in captions)
    assert len(own) >= 6  # validation's and the evaluation's
    assert "octopus" not in "".join(collect_prompts(recipe))


def test_the_resolved_recipe_holds_the_prompts_themselves(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, f"{SMALL}{SUBJECT_OF}}}"))
    assert "- a sks cat wearing a straw hat\n" in recipe.to_yaml()
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_a_file_of_ones_own_is_read_line_by_line(tmp_path: Path) -> None:
    own = tmp_path / "mine.txt"
    own.write_text("\ufeff# mine\n\na {} at sea\n  ein {} im Nebel  \n", encoding="utf-8")
    assert read_prompts(str(own)) == ("a {} at sea", "ein {} im Nebel")
    recipe = load_recipe(write(tmp_path, f"{SMALL}{SUBJECT_OF}}}"), [f"evaluation.prompts={own}"])
    assert recipe.evaluation is not None
    assert recipe.evaluation.prompts == ("a sks cat at sea", "ein sks cat im Nebel")


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("livee", r"evaluation.prompts: unknown list 'livee'; did you mean live\?"),
        ("no.txt", r"evaluation.prompts: the list no.txt cannot be read \(there is no such file"),
        ("EMPTY", r"evaluation.prompts: the list .*empty.txt has no prompts"),
        ("5", r"evaluation.prompts: must be a list \(got 5\)"),
        ("[5]", r"evaluation.prompts.0: must be a text \(got 5\)"),
    ],
)
def test_a_mistaken_list_is_named(prompts: str, said: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing yet\n")
    override = f"evaluation.prompts={prompts.replace('EMPTY', str(empty))}"
    with pytest.raises(UserError, match=said):
        load_recipe(write(tmp_path, f"{SMALL}{SUBJECT_OF}}}"), [override])


def test_clip_is_dreambooths_unless_named(tmp_path: Path) -> None:
    settings = evaluation_of(tmp_path)
    assert settings.clip == "openai/clip-vit-base-patch32"
    assert (settings.dino, settings.pictures_per_prompt) == (None, 1)
