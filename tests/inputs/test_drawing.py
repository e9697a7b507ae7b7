"""Prompts, settings, pictures and records that pictures are drawn from."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from adapters import Cascade, Parts, Sampling, StageSampling, UserError, load_cascade
from adapters.cascade.provenance import PictureInfo
from adapters.cascade.redraw import Redraw
from adapters.errors import print_once, quiet_libraries
from adapters.generate import main as generate
from adapters.texts import check_captions
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.drawing import FEW_STEPS, picture, right_half
from tests.builders.inputs import Refused, check_refused
from tests.builders.random_cascade import RandomCascade

STEPS = ["--stage-1-steps", "2", "--stage-2-steps", "2"]


@pytest.fixture(scope="module")
def dog(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported adapter of Stage I."""
    folder, spec = tmp_path_factory.mktemp("dog"), AdapterSpec(rank=2)
    export(trained_unet(random_cascade.stage_1, spec), folder, random_cascade.stage_1, 1, spec)
    return folder


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """The libraries are imported, which takes longer than any refusal."""
    quiet_libraries()


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are loaded: what is refused is refused before."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("unets.loading.load_unet", refuse)
    monkeypatch.setattr("adapters.base.source.Source.pipeline", refuse)
    monkeypatch.setattr("adapters.base.source.Source.text_encoder", refuse)


def write_record(path: Path, text: str) -> None:
    """Write a PNG with a text in the place of its record."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("if_picture", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)


def record(**changes: Any) -> str:
    """The record of a picture, with changes."""
    own = PictureInfo(
        stage=1, prompts={1: "a cat"}, models={1: "x/y"}, precisions={}, sampling=Sampling()
    )
    return json.dumps(own.model_dump(mode="json") | changes)


def write_inputs(folder: Path) -> None:
    """Write the files that the table below names."""
    picture().save(folder / "start.png")
    picture(width=16, height=16).save(folder / "small.png")
    picture(width=20, height=16).save(folder / "wide.png")
    picture(width=1, height=2000).save(folder / "line.png")
    picture(width=200, height=40).save(folder / "panorama.png")
    Image.new("L", (40, 40), "black").save(folder / "black.png")
    Image.new("RGBA", (40, 40), (255, 255, 255, 0)).save(folder / "clear.png")
    right_half().resize((20, 20)).save(folder / "small_mask.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "start.png").read_bytes()[:200])
    picture().save(folder / "photo.jpg")
    records = {
        "no_json": "{",
        "deep": "[" * 10**5,
        "list": "[]",
        "stage": record(stage=99),
        "seed": record(seed=-1),
        "scale": record(adapters={"dog": {"source": "dog", "scales": {"1": 1e30}}}),
        "guidance": record(sampling={"stage_1": {"guidance": 1e30}}),
        "steps": record(sampling={"stage_1": {"steps": 0}}),
        "unknown": record(run="me"),
        "way": record(way="img2img"),
        "models": record(models={"7": "x/y"}),
    }
    for name, text in records.items():
        write_record(folder / f"{name}.png", text)
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    encodings = {"prompt_embeds": torch.ones(2, 5, 32)}
    for name, prompts in {
        "list": '["a cat", ""]',
        "text": '"ab"',
        "numbers": "[1, 2]",
        "deep": "[" * 10**5,
        "three": '["a", "b", "c"]',
    }.items():
        save_file(encodings, folder / f"{name}.safetensors", metadata={"prompts": prompts})
    save_file(encodings, folder / "none.safetensors")
    save_file({"a": torch.ones(2)}, folder / "other.safetensors", metadata={"prompts": "[]"})
    (folder / "cut.safetensors").write_bytes((folder / "list.safetensors").read_bytes()[:50])


ONE, TWO, THREE = "--stage-1 {1}", "--stage-1 {1} --stage-2 {2}", "--stage-3 {3}"
LONG = "x" * 120_000
ZERO_WIDTH = "\u200b\ufeff"
SEED = "A seed must be a whole number from 0 to"

REFUSED: dict[str, tuple[str, Sequence[str]]] = {
    # settings
    "a scale that is not a number": (f"{ONE} --adapter {{dog}}=nan", ["scale of", "-1000", "nan"]),
    "an endless scale": (f"{ONE} --adapter {{dog}} --scale inf", ["scale of", "(got inf)"]),
    "a scale of 1e30": (f"{ONE} --adapter {{dog}}=1e30", ["from -1000 to 1000", "1e+30"]),
    "a scale of words": (f"{ONE} --adapter {{dog}}=much", ["not a scale", "give FOLDER=0.7"]),
    "a scale for a stage that it lacks": (f"{TWO} --adapter {{dog}}=2:1", ["names Stage 2"]),
    "two scales for a stage": (f"{ONE} --adapter {{dog}}=1:1,1:2", ["'1:1,1:2'", "not a scale"]),
    "an adapter of no loaded stage": ("--stage-2 {2} --low-res small.png --adapter {dog}", ["1"]),
    "an adapter for another base": ("--stage-1 {guarded} --adapter {dog}", ["trained on Stage 1"]),
    "no guidance": (f"{ONE} --stage-1-guidance 0", ["--stage-1-guidance: must be at least 1"]),
    "endless guidance": (f"{ONE} --stage-1-guidance inf", ["--stage-1-guidance", "(got inf)"]),
    "guidance that is not a number": (f"{ONE} --stage-1-guidance nan", ["must be a finite number"]),
    "a guidance of 1e30": (f"{ONE} --stage-1-guidance 1e30", ["must be at most 1000", "1e+30"]),
    "no steps": (f"{ONE} --stage-1-steps 0", ["--stage-1-steps: must be at least 1 (got 0)"]),
    "a billion steps": (f"{ONE} --stage-1-steps 1000000000", ["at most 10,000", "1000000000"]),
    "more steps than there are": (f"{ONE} --stage-1-steps 1001", ["steps is 1001", "1000"]),
    "unknown timesteps": (f"{ONE} --stage-1-timesteps fast72", ["did you mean fast27?"]),
    "half a step": (f"{ONE} --stage-1-steps 1.5", ["--stage-1-steps", "invalid int value: '1.5'"]),
    "a noise level below 0": (f"{TWO} --noise-level=-1", ["--noise-level: must be at least 0"]),
    "a noise level out of range": (f"{TWO} --noise-level 1000", ["noise_level is 1000", "999"]),
    "Stage III's noise level": (f"{TWO} {THREE} --stage-3-noise-level 351", ["is 351", "350"]),
    "pictures at once: none": (f"{ONE} --batch-size 0", ["--batch-size: must be at least 1"]),
    "no settings of training": (
        f"{ONE} --adapter {{dog}} --sampling as_trained",
        ["No adapter re"],
    ),
    # seeds and numbers
    "a negative seed": (f"{ONE} --seed=-1", [SEED, "(got -1)"]),
    "a seed of 2^64": (f"{ONE} --seed {2**64}", [SEED, f"(got {2**64})"]),
    "a last seed of 2^64": (f"{ONE} --seed {2**64 - 1} --images-per-prompt 2", [SEED]),
    "a seed of 10,000 digits": (f"{ONE} --seed {'9' * 10_000}", ["--seed", "letters) …"]),
    "half a seed": (f"{ONE} --seed 0.5", ["argument --seed", "'0.5'"]),
    "no pictures": (f"{ONE} --images-per-prompt 0", ["nothing to draw", "(got 0)"]),
    "a billion pictures": (f"{ONE} --images-per-prompt 1000000000", ["more than the 10,000"]),
    # words
    "120,000 letters": (f"{ONE} --prompt {LONG}", ["120,000 letters", "10,000", "shorten"]),
    "nothing to see": (f"{ONE} --prompt {ZERO_WIDTH}", ["no visible", "ZERO WIDTH SPACE"]),
    "a prompt of spaces": (f"{ONE} --stage-2-prompt \u3000", ["no visible", "IDEOGRAPHIC SPACE"]),
    "no UTF-8": (f"{ONE} --prompt a\udcff", ["a byte that is not UTF-8", "write it again"]),
    "only dropped words": (f"{ONE} --prompt <sks>", ["leaves no word of --prompt '<sks>'"]),
    "only Chinese": (f"{ONE} --prompt 狗", ["leaves no word of --prompt '狗'", "clean-caption"]),
    "only dropped words for Stage II": (f"{TWO} --stage-2-prompt #3", ["--stage-2-prompt '#3'"]),
    "only dropped words to avoid": (f"{ONE} --negative-prompt j0hn", ["--negative-prompt 'j0hn'"]),
    "words for Stage III": (f"{TWO} {THREE} --stage-3-prompt {ZERO_WIDTH}", ["no visible"]),
    "too many prompts": (f"{TWO} --stage-2-prompt b --stage-2-prompt c", ["Stage 2", "(got 2)"]),
    # pictures
    "a small picture that is not there": ("--stage-2 {2} --low-res no.png", ["no.png cannot be"]),
    "a small picture that is a text": ("--stage-2 {2} --low-res text.png", ["text.png cannot be"]),
    "a small picture that is large": (f"{TWO} --low-res photo.jpg", ["16 x 16 px", "40 x 40 px"]),
    "a small picture that is wide": ("--stage-2 {2} --low-res wide.png", ["16 x 16", "20 x 16"]),
    "small pictures of two sizes": (
        "--stage-2 {2} --low-res small.png --low-res start.png",
        ["one for all prompts", "(got 2)"],
    ),
    "a small picture for Stage I": (f"{ONE} --low-res small.png", ["Stage I does not enlarge"]),
    "no small picture": ("--stage-2 {2}", ["Stage I was not loaded", "give low_res"]),
    "half of a picture": (f"{ONE} --image cut.png", ["cut.png cannot be read"]),
    "an empty picture": (f"{ONE} --image empty.png", ["empty.png cannot be read"]),
    "a line": (f"{ONE} --image line.png", ["4 times", "1 x 2000 px", "crop it"]),
    "a panorama": (f"{ONE} --image panorama.png", ["4 times", "200 x 40 px", "crop it"]),
    "a mask alone": (f"{ONE} --mask black.png", ["give --image too"]),
    "a mask without white": (f"{ONE} --image start.png --mask black.png", ["mask", "paint white"]),
    "a clear mask": (f"{ONE} --image start.png --mask clear.png", ["mask", "found none"]),
    "a mask of another size": (f"{ONE} --image start.png --mask small_mask.png", ["40 x 40, 20"]),
    "a strength of nothing": (f"{ONE} --image start.png --strength 0", ["above 0 and at most 1"]),
    "a strength of 2": (f"{ONE} --image start.png --strength 2", ["at most 1", "(got 2"]),
    "a strength that is not a number": (f"{ONE} --image start.png --strength nan", ["at most 1"]),
    "a strength of words": (f"{ONE} --image start.png --strength much", ["--strength must be"]),
    "two strengths for a stage": (f"{ONE} --image start.png --strength 1:1,1:1", ["--strength"]),
    "a strength that leaves no steps": (
        f"{ONE} --image start.png --strength 0.01 --stage-1-steps 9",
        ["0.01 leaves none of the 9 steps of Stage 1"],
    ),
    # records
    "a picture without a record": ("--like plain.png", ["plain.png does not say", "'if_picture'"]),
    "a photo": ("--like photo.jpg", ["photo.jpg does not say", "not a PNG"]),
    "a text as a record": ("--like text.png", ["text.png cannot be read"]),
    "a record that is no JSON": ("--like no_json.png", ["no_json.png", "damaged", "JSON"]),
    "a record nested without end": ("--like deep.png", ["deep.png", "damaged"]),
    "a record that is a list": ("--like list.png", ["list.png", "damaged"]),
    "a record of Stage 99": ("--like stage.png", ["stage.png", "stage must be at most 3 (got 99)"]),
    "a record of a negative seed": ("--like seed.png", ["seed must be at least 0 (got -1)"]),
    "a record of a scale of 1e30": (
        "--like scale.png",
        ["adapters.dog.scales", "must be at most 1"],
    ),
    "a record of guidance of 1e30": ("--like guidance.png", ["guidance must be at most 1000"]),
    "a record of no steps": ("--like steps.png", ["stage_1.steps must be at least 1 (got 0)"]),
    "a record with more": ("--like unknown.png", ["unknown.png", "run", "damaged"]),
    "a record from a picture": ("--like way.png", ["draw from a picture, give --image too"]),
    "a record of a Stage 7": ("--like models.png", ["models", "must be at most 3"]),
    # encodings
    "no file of encodings": (f"{ONE} --embeds no.safetensors", ["no.safetensors", "no such file"]),
    "half of the encodings": (f"{ONE} --embeds cut.safetensors", ["cut.safetensors cannot be"]),
    "a picture as encodings": (f"{ONE} --embeds start.png", ["start.png cannot be read as text"]),
    "encodings without prompts": (f"{ONE} --embeds none.safetensors", ["has no 'prompts'"]),
    "encodings without values": (f"{ONE} --embeds other.safetensors", ["'prompt_embeds'"]),
    "encodings of a text": (f"{ONE} --embeds text.safetensors", ["must be a list of texts"]),
    "encodings of numbers": (f"{ONE} --embeds numbers.safetensors", ["a list of texts (got [1"]),
    "encodings nested without end": (f"{ONE} --embeds deep.safetensors", ["deep.safetensors"]),
    "fewer encodings than prompts": (f"{ONE} --embeds three.safetensors", ["three.safetensors"]),
    "encodings of other prompts": (
        f"{ONE} --embeds list.safetensors --prompt dog",
        ["no encoding of 'dog'", "encode it too"],
    ),
    "encodings that are all the same": (f"{ONE} --embeds list.safetensors", ["the empty caption"]),
    # models, devices and options
    "no model": ("", ["name at least one model"]),
    "a model that is not there": ("--stage-1 no/such/place", ["'no/such/place'", "correct the"]),
    "a model that is a file": ("--stage-1 text.png", ["text.png"]),
    "stages in each other's place": ("--stage-1 {2} --stage-2 {1}", ["IFPipeline"]),
    "Stage III as Stage II": ("--stage-1 {1} --stage-2 {3}", ["StableDiffusionUpscalePipeline"]),
    "an unknown device": (f"{ONE} --device toaster", ["'toaster' cannot be used", "cpu"]),
    "a device that there is not": (f"{ONE} --device cuda:99", ["'cuda:99' cannot be used"]),
    "a precision of words": (f"{ONE} --dtype fp99", ["argument --dtype", "'fp99'", "--help"]),
    "memory that is no size": (f"{ONE} --memory lots", ["memory", "lots"]),
    "memory without a GPU": (f"{ONE} --memory 6GB --device cpu", ["is for a GPU"]),
    "an unknown option": (f"{ONE} --noise-lvl 3", ["unrecognized arguments: --noise-lvl", "did"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_is_loaded(
    name: str,
    unloaded: None,
    dog: Path,
    random_cascade: RandomCascade,
    guarded_cascade: RandomCascade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    flags, says = REFUSED[name]

    def arrange(folder: Path) -> list[str]:
        monkeypatch.chdir(folder)
        write_inputs(folder)
        stages = {str(n): random_cascade.stage(n) for n in (1, 2, 3)}
        given = stages | {"dog": dog, "guarded": guarded_cascade.stage_1}
        parts = flags.split(" ") if flags else []
        for name, place in given.items():
            parts = [part.replace(f"{{{name}}}", str(place)) for part in parts]
        prompt = [] if {"--prompt", "--like"} & {*parts} else ["--prompt", "a cat"]
        device = [] if "--device" in parts else ["--device", "cpu"]
        return [*parts, *prompt, *device, "--out", "drawn"]

    check_refused(Refused(name, arrange, says), generate, tmp_path, capsys)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.fixture(scope="module")
def cascade(random_cascade: RandomCascade) -> Cascade:
    return load_cascade(random_cascade.stage_1, random_cascade.stage_2, device="cpu")


CALLS: dict[str, tuple[Callable[[Cascade], object], str]] = {
    "a prompt of nothing": (lambda c: c(None), r"A prompt must be a string \(got None\)"),
    "prompts: none": (lambda c: c([]), "nothing to draw"),
    "a prompt of bytes": (lambda c: c(b"cat"), "A prompt must be a string"),
    "a long prompt": (lambda c: c(LONG), "has 120,000 letters, more than 10,000; shorten it"),
    "a negative prompt of a number": (lambda c: c("a", negative_prompt=3), "must be a string"),
    "a million pictures": (lambda c: c("a", images_per_prompt=10**6), "more than the 10,000"),
    "half a picture": (lambda c: c("a", images_per_prompt=0.5), "whole number from 1"),
    "a seed of words": (lambda c: c("a", seed="x"), r"A seed must be .* \(got 'x'\)"),
    "a seed of nothing": (lambda c: c("a", seed=None), r"\(got None\)"),
    "settings of a mapping": (lambda c: c("a", sampling={}), r"sampling must be a Sampling"),
    "settings as trained": (lambda c: c("a", sampling="as_trained"), "and none does"),
    "steps beyond the scheduler's": (
        lambda c: c("a", sampling=Sampling(stage_1=StageSampling(steps=1001))),
        "stage_1.steps is 1001, but this cascade allows 1000",
    ),
    "a noise level beyond the scheduler's": (
        lambda c: c("a", sampling=Sampling(stage_2=StageSampling(noise_level=1000))),
        "stage_2.noise_level is 1000, but this cascade allows 999",
    ),
    "endless guidance": (lambda c: StageSampling(guidance=float("inf")), "guidance: must be"),
    "guidance of 1e9": (lambda c: StageSampling(guidance=1e9), "guidance: must be at most 1000"),
    "steps of a text": (lambda c: StageSampling(steps="5"), "steps: must be a whole number"),
    "encodings of a file's name": (lambda c: c("a", embeds="a.safetensors"), "load_embeds"),
    "encodings of a list": (
        lambda c: c("a", embeds={"a": [1.0], "": [1.0]}),
        r"Encodings must be floating-point tensors .*found list",
    ),
    "encodings of 8 bits": (
        lambda c: c("a", embeds=dict.fromkeys(("a", ""), torch.ones(5, 32).to(torch.float8_e5m2))),
        r"Encodings must be floating-point tensors .*float8",
    ),
    "encodings of no tokens": (
        lambda c: c("a", embeds=dict.fromkeys(("a", ""), torch.ones(0, 32))),
        r"Encodings must be floating-point tensors",
    ),
    "a small picture of another size": (
        lambda c: c("a", low_res=picture()),
        r"low_res pictures must be 16 x 16 px, .* \(found 40 x 40 px\); crop",
    ),
    "a small picture of an array": (
        lambda c: c("a", low_res=np.zeros((16, 16, 3))),
        r"A low_res picture must be a PIL image or a file \(got a ndarray\)",
    ),
    "a picture of one line": (
        lambda c: c.img2img(picture(width=2000, height=1), "a"),
        r"at most 4 times as long as it is wide \(found 2000 x 1 px\)",
    ),
    "a mask of an array": (
        lambda c: c.inpaint(picture(), np.ones((40, 40)), "a"),
        r"A mask must be a PIL image or a file \(got a ndarray\)",
    ),
    "a strength of a text": (lambda c: c.img2img(picture(), "a", strength="x"), "strength must"),
    "adapters of a number": (lambda c: c.set_adapters(3), r"given by name, .* \(got 3\)"),
    "an adapter that there is not": (lambda c: c.set_adapters({"dog": 1}), "No adapter is called"),
    "an adapter that is a number": (lambda c: c.add_adapter(3), r"hub name \(got 3\)"),
    "a pair of three": (
        lambda c: load_cascade(c.base_names[1], adapters=[("a", 1, 2)], device="cpu"),
        r"a pair of it and its scale \(got \('a', 1, 2\)\)",
    ),
    "a device of nothing": (
        lambda c: load_cascade(c.base_names[1], device=["cpu"]),
        "cannot be used",
    ),
    "parts of a text": (
        lambda c: load_cascade(c.base_names[1], parts="unet", device="cpu"),
        r"parts must be a Parts\(...\) \(got 'unet'\)",
    ),
    "to encode what is emptied": (lambda c: c.encode(["<sks>"]), "leaves no word of the prompt"),
    "to encode numbers": (lambda c: c.encode([3]), r"A prompt must be a string \(got 3\)"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_refused(name: str, cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    call, says = CALLS[name]
    for recorded in cascade.recorded.values():
        monkeypatch.setattr(recorded, "function", lambda **_: pytest.fail("something was drawn"))
    with pytest.raises(UserError, match=says):
        call(cascade)
    assert not cascade.adapters


def draw(*flags: object) -> None:
    generate([str(flag) for flag in (*flags, "--device", "cpu")])


EFFECTLESS: Mapping[str, tuple[str, str]] = {
    "a prompt for Stage II": ("--stage-2-prompt dog", "--stage-2-prompt has no effect without St"),
    "settings of Stage II": (
        "--noise-level 3 --stage-2-guidance 2",
        "--stage-2-guidance, --noise-level have no effect without Stage II.",
    ),
    "settings of Stage III": (
        "--stage-3-steps 3",
        "--stage-3-steps has no effect without Stage III",
    ),
    "a scale of nothing": ("--scale 0.5", "--scale has no effect without --adapter."),
    "a scale of scaled adapters": (
        "--adapter {dog}=0.5 --scale 1",
        "--scale has no effect as each adapter has its own.",
    ),
    "the revision of a folder": ("--revision v2", "The revision 'v2' has no effect on"),
    "a negative prompt without guidance": (
        "--negative-prompt dog --stage-1-guidance 1",
        "--negative-prompt has no effect with a guidance of 1.",
    ),
}


@pytest.mark.parametrize("name", EFFECTLESS)
def test_an_option_without_effect_is_said(
    name: str,
    random_cascade: RandomCascade,
    dog: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, says = EFFECTLESS[name]
    print_once.cache_clear()
    given = flags.format(dog=dog).split()
    base = ["--stage-1", random_cascade.stage_1, "--prompt", "a cat", "--stage-1-steps", 2]
    draw(*base, *given, "--out", tmp_path / "drawn")
    error = capsys.readouterr().err
    assert says in error
    assert error.count("no effect") == 1


def test_a_prompt_without_its_stage_is_said(
    random_cascade: RandomCascade, capsys: pytest.CaptureFixture[str]
) -> None:
    print_once.cache_clear()
    one = load_cascade(random_cascade.stage_1, device="cpu")
    for stage_2_prompt, said in (("a cat", ""), ("a dog", "stage_2_prompt has no effect: this")):
        one("a cat", stage_2_prompt=stage_2_prompt, sampling=FEW_STEPS, progress=False)
        assert capsys.readouterr().err.startswith(said)


TEXTS = {
    "accents and quotes": "Ein “süßer” Hund, l'été",
    "10,000 letters": "cat " * 2500,
    "a word of 10,000 letters": "x" * 10_000,
    "a tag that is not closed": "<" + "a" * 9_999,
    "a path": "photos/cat and dog",
    "a format": "{} %s {0} $HOME `cat`",
    "the empty caption": "",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_prompt_is_drawn(name: str, random_cascade: RandomCascade, tmp_path: Path) -> None:
    prompt = TEXTS[name]
    check_captions({prompt: "the prompt"}, clean_caption=True, setting="")
    one = load_cascade(random_cascade.stage_1, device="cpu")
    images = one(prompt, sampling=FEW_STEPS, progress=False)
    assert images.prompts == (prompt,)
    sheet = Image.open(images.save(tmp_path))
    assert sheet.width < 400
    assert sheet.height < 1600


def test_a_mask_painted_on_transparency_is_what_is_painted() -> None:
    mask = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (20, 0, 40, 40))
    (read,) = Redraw.of(picture(), mask).masks
    assert np.array_equal(np.asarray(read.convert("L")), np.asarray(right_half()))


def test_what_is_no_number_is_not_drawn(random_cascade: RandomCascade) -> None:
    one = load_cascade(random_cascade.stage_1, device="cpu", parts=Parts())
    one.stages[1].unet.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="Stage I drew values that are NaN or infinite; lower the"):
        one("a cat", sampling=FEW_STEPS, progress=False)
