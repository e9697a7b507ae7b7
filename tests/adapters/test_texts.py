"""No word of a caption is lost unsaid, whichever way a text goes to the encoder."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import IFPipeline
from PIL import Image

from adapters import (
    Cascade,
    Sampling,
    StageSampling,
    UserError,
    load_cascade,
    load_embeds,
    save_embeds,
    texts,
)
from adapters.base.source import Source
from adapters.cascade.provenance import read_picture_info
from adapters.encode import main as encode
from adapters.generate import main as generate
from adapters.texts import check_captions, check_vocabulary, clean, find_flaw, find_lost_words
from finetune import precompute
from finetune.data.captions import CaptionCache, collect_captions, embed_captions
from finetune.data.pictures import Picture
from finetune.evaluation.comparison import compare
from finetune.recipe.file import load_recipe
from finetune.recipe.schema import Recipe
from finetune.run.early_checks import check_recipe
from tests.builders.random_cascade import RandomCascade, t5_tokenizer

CPU = torch.device("cpu")
FEW = Sampling(stage_1=StageSampling(steps=2), stage_2=StageSampling(steps=2))

LOST = {
    "a photo of <sks> dog": ["<sks>"],
    "a photo of &lt;sks&gt; dog": ["<sks>"],
    "J0hn, a man": ["j0hn"],
    "a p3rs0n": ["p3rs0n"],
    "sks123 on a beach": ["sks123"],
    "dog #3 and 3 cats": ["#3"],
    "a photo of @mydog, and (@mycat)": ["@mydog", "@mycat"],
    "a photo of 猫": ["猫"],
    "a cat猫dog": ["cat猫dog"],
    "a 1920x1080 photo": ["1920x1080"],
    "page 3, 3 cats": ["page", "3"],
    "download a free cat": ["download"],
    "click on cats, a photo": ["click", "on", "cats"],
    "see www.dogs.com for a dog": ["www.dogs.com"],
    "a photo of my_dog.png there": ["my_dog.png"],
    "two cafÃ©s": ["cafés"],
}
"""Captions, and the words that cleaning drops."""

EMPTIED = [
    *("<sks>", " <SKS> ", "j0hn", "p3rs0n", "sks123", "#3", "@mydog", "一只猫", "猫!", "<sks>."),
    *("***", "free shipping", "cat.png", "#3 @mydog <sks>"),
]
"""Captions of which cleaning leaves no word."""

KEPT = [
    *("", "a sks dog", "  A   Photo, of   sks DOG!  ", "<b>Photo</b> of <i>it</i>", "a<br/>dog"),
    *("Tom &amp; Jerry", "caf&eacute; “quoted” \u2018so\u2019", "rock+roll", "100% or 100%25"),
    *("this-is-my-cute-dog", "this_is_my_cute_dog", "a [dog] (large) / *small*", "it's a dog…"),
    *("<person> in a hat", "f/1.8, 35mm", "\uff26\uff35\uff2c\uff2c width", "a \\n b", "🐙"),
    *("собака", "の", "c++ & c#", "<a href='x'>dog</a>", "!!!", "dog,cat;bird", "«dog» \u2013 cat"),
]
"""Captions that cleaning changes at most in case, punctuation, spaces and markup."""

FAILING = "the text encoder was loaded"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(texts, "_said", set())


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail(FAILING)

    monkeypatch.setattr(Source, "text_encoder", refuse)
    monkeypatch.setattr(Source, "unet", refuse)


@pytest.fixture(scope="module")
def cascade(random_cascade: RandomCascade) -> Cascade:
    return load_cascade(random_cascade.stage_1, random_cascade.stage_2, device="cpu")


def check(*texts: str, clean_caption: bool = True) -> None:
    places = dict.fromkeys(texts, "field")
    check_captions(places, clean_caption=clean_caption, setting="SETTING")


class Listening:
    """A tokenizer that takes down what it is given, and goes no further."""

    def __call__(self, texts: list[str], **_: object) -> None:
        self.texts = texts
        raise InterruptedError


@pytest.mark.parametrize("caption", [*LOST, *EMPTIED, *KEPT])
def test_cleaning_is_that_of_encode_prompt(caption: str) -> None:
    pipeline = IFPipeline(*[None] * 7, requires_safety_checker=False)
    pipeline.tokenizer = listening = Listening()
    with pytest.raises(InterruptedError):
        pipeline.encode_prompt(caption, False, device=CPU, clean_caption=True)
    assert listening.texts == [clean(caption)]


@pytest.mark.parametrize(("caption", "words"), LOST.items())
def test_words_that_cleaning_drops_are_said(
    caption: str, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert list(find_lost_words(caption, clean(caption))) == words
    check(caption)
    (message,) = caplog.messages
    assert all(repr(word) in message for word in words)
    assert repr(caption) in message
    assert "SETTING" in message


@pytest.mark.parametrize("caption", EMPTIED)
def test_a_caption_that_cleaning_empties_is_refused(
    caption: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError) as error:
        check("a dog", caption)
    assert f"leaves no word of field {caption!r}; " in str(error.value)
    assert "with SETTING." in str(error.value)
    check("a dog", caption, clean_caption=False)
    assert caplog.messages == []


@pytest.mark.parametrize("caption", KEPT)
def test_benign_changes_are_no_loss(caption: str, caplog: pytest.LogCaptureFixture) -> None:
    assert find_lost_words(caption, clean(caption)) == ()
    check(caption)
    assert caplog.messages == []


@pytest.mark.parametrize("caption", [" ", "\u200b", "\ufeff\u2060 ", "\u00ad\n"])
def test_a_caption_without_visible_characters_is_refused(caption: str) -> None:
    for clean_caption in (True, False):
        with pytest.raises(UserError, match=r"of field has no visible character \(found [A-Z]"):
            check(caption, clean_caption=clean_caption)
    assert find_flaw(f"a{caption}") is None


def test_each_word_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    check("j0hn on a beach")
    check("a photo of j0hn", "j0hn on a beach")
    assert len(caplog.messages) == 1
    check("a photo of j0hn #3")
    assert "drops '#3' in" in caplog.messages[1]


def test_a_large_dataset_is_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    many = [f"a dog, {index}, on beach sks{1000 + index}" for index in range(50)]
    check(*many, *(f"a dog, {index}" for index in range(150)))
    (message,) = caplog.messages
    assert "'sks1000', 'sks1001', " in message
    assert "and 30 more in 50 of 200 captions, such as field" in message
    assert len(message) < 1000
    with pytest.raises(UserError, match="'#1', nor of 2 more captions; "):
        check("a dog", "#1", "#2", "#3")


def test_only_the_first_process_speaks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    check("a photo of j0hn")
    assert caplog.messages == []


def test_words_that_the_tokenizer_does_not_know_are_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = dict.fromkeys(["a dog, 猫", "猫 собака 🐙", "A photo <of> {sks}!"], "field")
    check_vocabulary(texts, t5_tokenizer(), clean_caption=False)
    (message,) = caplog.messages
    assert "does not know '猫', 'собака', '🐙' in 2 of 3 captions" in message
    check_vocabulary(texts, t5_tokenizer(), clean_caption=False)
    assert len(caplog.messages) == 1
    check_vocabulary({"猫 a dog": "", "": ""}, t5_tokenizer(), clean_caption=True)
    assert len(caplog.messages) == 1


DRAWINGS: dict[str, Callable[..., object]] = {
    "the prompt": lambda c, text, **o: c(text, **o),
    "one of several": lambda c, text, **o: c(["a dog", text], **o),
    "stage_2_prompt": lambda c, text, **o: c("a dog", stage_2_prompt=text, **o),
    "negative_prompt": lambda c, text, **o: c("a dog", negative_prompt=text, **o),
    "img2img": lambda c, text, **o: c.img2img(Image.new("RGB", (64, 64)), text, **o),
    "inpaint": lambda c, text, **o: c.inpaint(
        Image.new("RGB", (64, 64)), Image.new("L", (64, 64), 255), text, **o
    ),
}


@pytest.mark.parametrize(("name", "draw"), DRAWINGS.items(), ids=DRAWINGS)
def test_no_prompt_of_a_cascade_is_emptied(
    name: str,
    draw: Callable[..., object],
    cascade: Cascade,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cascade.text.text_encoder, "forward", lambda *_, **__: pytest.fail(FAILING))
        place = name if "_" in name else "the prompt"
        with pytest.raises(UserError, match=rf"{place} '<sks>'.*clean_caption=False"):
            draw(cascade, "<sks>", sampling=FEW, progress=False)
    draw(cascade, "a <sks>", sampling=FEW, progress=False)
    draw(cascade, "<sks>", sampling=FEW, progress=False, clean_caption=False)
    assert [message.partition(" in ")[0] for message in caplog.messages] == [
        "Cleaning drops '<sks>'"
    ]


def test_encode_refuses_and_says(cascade: Cascade, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="'#3'"):
        cascade.encode(["a dog", "#3"])
    cascade.encode(["a dog #3", ""])
    assert "Cleaning drops '#3'" in caplog.messages[0]
    cascade.encode(["a 猫"], clean_caption=False)
    assert "does not know '猫' in 1 of 1 captions" in caplog.messages[1]
    raw, empty = cascade.encode(["#3", ""], clean_caption=False)
    assert not torch.equal(raw, empty)


@pytest.mark.parametrize("flag", ["--prompt", "--stage-2-prompt", "--negative-prompt"])
@pytest.mark.usefixtures("no_encoder")
def test_generate_refuses_before_it_loads(
    flag: str, random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--stage-1", str(random_cascade.stage_1), "--out", str(tmp_path), "--prompt", "a dog"]
    with pytest.raises(SystemExit):
        generate([*base, flag, "<sks>"])
    error = capsys.readouterr().err
    assert f"{flag} '<sks>'" in error
    assert "--no-clean-caption" in error


def test_generate_keeps_what_it_is_told_to_and_draws_it_again(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    steps = ["--stage-1-steps", "2"]
    base = ["--stage-1", str(random_cascade.stage_1), *steps]
    generate([*base, "--prompt", "<sks>", "--no-clean-caption", "--out", str(tmp_path / "one")])
    (one,) = (tmp_path / "one").glob("000-*")
    assert not read_picture_info(one).clean_caption
    generate(["--like", str(one), "--out", str(tmp_path / "two")])
    (two,) = (tmp_path / "two").glob("000-*")
    assert two.read_bytes() == one.read_bytes()


def test_the_encode_command_refuses_before_it_loads_and_keeps_what_it_is_told_to(
    random_cascade: RandomCascade,
    cascade: Cascade,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "one.safetensors"
    command = [str(random_cascade.stage_1), "--prompt", "<sks>", "--out", str(file)]
    encode([*command, "--prompt", "猫", "--no-clean-caption", "--device", "cpu"])
    assert "does not know '猫' in 1 of 3 captions" in caplog.messages[0]
    embeds = load_embeds(file)
    expected = cascade.encode(["<sks>"], clean_caption=False)[0]
    assert torch.equal(embeds["<sks>"], expected)
    cascade("<sks>", embeds=embeds, sampling=FEW, progress=False)
    request.getfixturevalue("no_encoder")
    with pytest.raises(SystemExit):
        encode(command)


def test_encodings_that_were_emptied_elsewhere_are_refused(
    cascade: Cascade, tmp_path: Path
) -> None:
    plain, _ = cascade.text.encode_prompt(["a dog", "<sks>", ""], False, clean_caption=True)
    save_embeds(tmp_path / "old", ["a dog", "<sks>", ""], plain)
    embeds = load_embeds(tmp_path / "old")
    cascade("a dog", embeds=embeds, sampling=FEW, progress=False)
    with pytest.raises(UserError, match=r"encoding of '<sks>' is that of the empty caption"):
        cascade("<sks>", embeds=embeds, sampling=FEW, progress=False)


def recipe_tree(base: RandomCascade, folder: Path) -> dict[str, Any]:
    return {
        "name": "test",
        "base": {"stage_1": str(base.stage_1)},
        "data": {"source": str(folder / "pictures"), "prompt": "a sks dog"},
        "prior": {"prompts": ["a dog"]},
        "validation": {"prompts": ["a sks dog"], "stage_2_prompts": ["a dog"]},
        "evaluation": {
            "prompts": ["a sks dog"],
            "stage_2_prompts": ["a dog"],
            "other_prompts": ["a cat"],
            "subject": "dog",
            "identifier": "sks dog",
            "clip": "none",
        },
        "stage_1": {"steps": 1},
        "cache_dir": str(folder / "cache"),
    }


FIELDS = [
    *("data.prompt", "prior.prompts", "validation.prompts", "validation.stage_2_prompts"),
    *("evaluation.prompts", "evaluation.stage_2_prompts"),
    *("evaluation.other_prompts", "evaluation.class_prompts"),
]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.usefixtures("no_encoder")
def test_no_caption_of_a_recipe_is_emptied(
    field: str, random_cascade: RandomCascade, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = recipe_tree(random_cascade, tmp_path)
    section, name = field.split(".")

    def with_text(text: str, /, **sections: Any) -> Recipe:
        changes: dict[str, Any] = {name: text if field == "data.prompt" else [text]}
        if field == "evaluation.prompts":
            changes["identifier"] = "#3"  # which the prompts contain
        return Recipe.model_validate(tree | {section: tree[section] | changes} | sections)

    sentence = rf"leaves no word of {field} '#3'; .* text.clean_caption: false"
    with pytest.raises(UserError, match=sentence):
        check_recipe(with_text("#3"), CPU)
    with pytest.raises(UserError, match=sentence):
        embed_captions(collect_captions(with_text("#3"), ()), CaptionCache.of(with_text("#3"), CPU))
    check_recipe(with_text("a dog #3"), CPU)
    assert f"{field} 'a dog #3'" in caplog.messages[0]
    if section == "evaluation":
        (tmp_path / "runs/test/adapters").mkdir(parents=True)
        with pytest.raises(UserError, match=sentence):
            compare(with_text("#3", runs_dir=str(tmp_path / "runs")))
    check_recipe(with_text("#3", text={"clean_caption": False}), CPU)
    assert len(caplog.messages) == 1


@pytest.mark.usefixtures("no_encoder")
def test_a_pictures_caption_is_refused_by_its_name(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = recipe_tree(random_cascade, tmp_path)
    del tree["data"]["prompt"]
    recipe = Recipe.model_validate(tree)
    pictures = [Picture(tmp_path / "0.npy", "j0hn", "photos/0.png")]
    with pytest.raises(UserError, match=r"no word of the caption of photos/0.png 'j0hn'"):
        embed_captions(collect_captions(recipe, pictures), CaptionCache.of(recipe, CPU))
    folder = Path(recipe.data.source)
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "0.png")
    (folder / "0.txt").write_text("j0hn")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with pytest.raises(SystemExit):
        precompute.main([str(file)])
    assert f"no word of row 0 of {folder} 'j0hn'" in capsys.readouterr().err


def test_unknown_words_of_a_recipe_are_said_before_they_are_encoded(
    random_cascade: RandomCascade, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = recipe_tree(random_cascade, tmp_path) | {"text": {"clean_caption": False}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    recipe = load_recipe(file, ["data.prompt=一只猫 #3"])
    with caplog.at_level(logging.WARNING):
        embeds = embed_captions(collect_captions(recipe, ()), CaptionCache.of(recipe, CPU))
    assert "does not know '一只猫' in 1 of " in caplog.messages[0]
    assert "data.prompt '一只猫 #3'" in caplog.messages[0]
    assert not torch.equal(embeds["一只猫 #3"], embeds[""])
