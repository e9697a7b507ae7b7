"""Text encodings as a file: made with the text encoder, used without it."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import pytest
import torch
from diffusers import IFPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

from adapters import (
    Cascade,
    Parts,
    Sampling,
    StageSampling,
    UserError,
    load_cascade,
    load_embeds,
    save_embeds,
)
from adapters.encode import main as encode
from adapters.generate import main as generate
from tests.builders.drawing import pixels
from tests.builders.random_cascade import RandomCascade

FEW = Sampling(stage_1=StageSampling(steps=3), stage_2=StageSampling(steps=2))
PROMPTS = ["A <b>Photo</b> of a sks cat ", "a photo of a cat", ""]


@pytest.fixture(scope="module")
def file(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encodings that the command line makes."""
    path = tmp_path_factory.mktemp("embeds") / "prompts.safetensors"
    flags = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--out", str(path)]
    encode([str(random_cascade.stage_1), *flags, "--precision", "fp32", "--device", "cpu"])
    return path


@pytest.fixture
def no_encoder(random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch) -> Cascade:
    """A cascade that never had a text encoder."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a text encoder was loaded")

    monkeypatch.setattr(T5EncoderModel, "__init__", refuse)
    folders = (random_cascade.stage_1, random_cascade.stage_2)
    return load_cascade(*folders, parts=Parts(text_encoder=False))


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    embeds = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    save_embeds(tmp_path / "new" / "one.safetensors", ["“a”", ""], embeds)
    back = load_embeds(tmp_path / "new" / "one.safetensors")
    assert list(back) == ["“a”", ""]
    assert torch.equal(torch.stack(list(back.values())), embeds)
    with pytest.raises(UserError, match=r"one encoding for each of 1 prompts \(got 2\)"):
        save_embeds(tmp_path / "new" / "two.safetensors", ["a"], embeds)
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_encodings_of_the_command_line_are_the_pipelines(
    random_cascade: RandomCascade, file: Path
) -> None:
    pipe = IFPipeline.from_pretrained(random_cascade.stage_1)
    embeds = load_embeds(file)
    assert list(embeds) == PROMPTS
    for prompt in PROMPTS:
        expected, _ = pipe.encode_prompt(prompt, False, clean_caption=True)
        assert torch.equal(embeds[prompt], expected[0])


def test_stage_2_encodes_with_a_text_encoder_of_its_own(
    random_cascade: RandomCascade, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "one.safetensors"
    encode(
        [str(random_cascade.stage_2), "--prompt", PROMPTS[1], "--device", "cpu", "--out", str(out)]
    )
    assert torch.equal(load_embeds(out)[PROMPTS[1]], load_embeds(file)[PROMPTS[1]])


def test_encoding_loads_nothing_but_the_text_encoder(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a UNet was loaded")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", refuse)
    monkeypatch.setattr(UNet2DConditionModel, "from_config", refuse)
    path = tmp_path / "one.safetensors"
    encode([str(random_cascade.stage_1), "--prompt", "a", "--precision", "nf4", "--out", str(path)])
    embeds = load_embeds(path)
    assert {rows.dtype for rows in embeds.values()} == {torch.bfloat16}


def test_pictures_of_a_file_are_those_of_the_text_encoder(
    random_cascade: RandomCascade, no_encoder: Cascade, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"stage_2_prompt": PROMPTS[1], "sampling": FEW, "progress": False, "seed": 4}
    images = no_encoder(PROMPTS[0], embeds=load_embeds(file), **options)
    monkeypatch.undo()
    encoded = load_cascade(random_cascade.stage_1, random_cascade.stage_2)(PROMPTS[0], **options)
    assert torch.equal(images.low_res, encoded.low_res)
    assert np.array_equal(pixels(images.final[0]), pixels(encoded.final[0]))
    assert images == encoded


def test_several_pictures_and_a_picture_to_start_from(no_encoder: Cascade, file: Path) -> None:
    embeds = load_embeds(file)
    options = {"embeds": embeds, "sampling": FEW, "progress": False}
    images = no_encoder(PROMPTS[:2], negative_prompt=PROMPTS[1], images_per_prompt=2, **options)
    assert len(images) == 4
    redrawn = no_encoder.img2img(images[0].final, PROMPTS[1], strength=0.7, **options)
    assert redrawn.prompts == (PROMPTS[1],)


def test_what_is_not_in_a_file_is_said(no_encoder: Cascade, file: Path) -> None:
    embeds = load_embeds(file)
    with pytest.raises(UserError, match=r"no encoding of 'a photo of a dog' .* 'a photo of a cat'"):
        no_encoder("a photo of a dog", embeds=embeds)
    with pytest.raises(UserError, match="no encoding of 'a dog' among"):
        no_encoder(PROMPTS[1], negative_prompt="a dog", embeds=embeds)
    with pytest.raises(UserError, match="no encoding of ''"):
        no_encoder(PROMPTS[1], embeds={PROMPTS[1]: embeds[PROMPTS[1]]})


def test_encodings_that_do_not_fit_are_said(no_encoder: Cascade) -> None:
    empty = torch.zeros(5, 32)
    for width, tokens, sentence in (
        (16, 5, "Stage 1 are 16 wide, but its UNet reads 32"),
        (32, 6, r"shape \[1, 6, 32\], and those of negative prompts \[1, 5, 32\]"),
    ):
        with pytest.raises(UserError, match=sentence):
            no_encoder("a", embeds={"a": torch.ones(tokens, width), "": empty})
    with pytest.raises(UserError, match=r"\[5, 32\] and torch.float32 \[6, 32\]"):
        no_encoder(["a", "b"], embeds={"a": torch.ones(5, 32), "b": torch.ones(6, 32), "": empty})
    with pytest.raises(UserError, match="encoding of '' has values that are not finite"):
        no_encoder("a", embeds={"a": torch.ones(5, 32), "": empty * torch.nan})
    with pytest.raises(UserError, match="nothing to draw"):
        no_encoder([], embeds={"": empty})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda embeds: embeds[0],
            r"\[tokens, width\], all of one shape \(found torch.float32 \[32\]\)",
        ),
        (lambda embeds: embeds[None], r"\(found torch.float32 \[1, 7, 32\]\)"),
        (lambda embeds: embeds * torch.nan, "has values that are not finite"),
        (lambda embeds: embeds.int(), r"floating-point tensors .* torch.int32 \[7, 32\]\)"),
        (lambda embeds: embeds.tolist(), r"floating-point tensors .* \(found list\)"),
    ],
)
def test_encodings_that_are_none_are_said(
    no_encoder: Cascade, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    embeds = torch.randn(7, no_encoder.stages[1].unet.config.encoder_hid_dim)
    with pytest.raises(UserError, match=sentence):
        no_encoder("a", embeds={"a": change(embeds), "": embeds})


def test_a_file_that_is_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    with pytest.raises(UserError, match=r"one\.safetensors cannot be read as text encodings"):
        load_embeds(path)
    path.write_text("no tensors")
    with pytest.raises(UserError, match="cannot be read as text encodings"):
        load_embeds(path)
    for metadata in (None, {"prompts": "[]"}, {"prompts": "["}, {"prompts": "3"}):
        path.unlink()
        save_file({"prompt_embeds": torch.zeros(1, 5, 32)}, path, metadata=metadata)
        with pytest.raises(UserError, match=r"adapters\.encode"):
            load_embeds(path)


def test_the_command_line_draws_without_a_text_encoder(
    random_cascade: RandomCascade, no_encoder: Cascade, file: Path, tmp_path: Path
) -> None:
    flags = ["--stage-1", str(random_cascade.stage_1), "--stage-1-steps", "3"]
    given = ["--prompt", PROMPTS[1], "--embeds", str(file), "--out", str(tmp_path)]
    generate([*flags, *given])
    no_encoder.stages = {1: no_encoder.stages[1]}
    expected = no_encoder(PROMPTS[1], embeds=load_embeds(file), sampling=FEW, progress=False)
    drawn = Image.open(tmp_path / "000-a-photo-of-a-cat-seed0-stage_1.png")
    assert np.array_equal(pixels(drawn), pixels(expected.final[0]))


def test_mistakes_of_the_command_lines(
    random_cascade: RandomCascade, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--prompt", "a dog", "--out", str(tmp_path / "out")]
    base = ["--stage-1", str(random_cascade.stage_1)]
    model = [str(random_cascade.stage_1)]
    no_text = tmp_path / "no_text"
    copytree(random_cascade.stage_2, no_text, ignore=ignore_patterns("text_encoder"))
    index = json.loads((no_text / "model_index.json").read_text())
    none = json.dumps(index | {"text_encoder": [None, None]})
    (no_text / "model_index.json").write_text(none)
    for run, arguments, sentence in (
        (encode, ["no/such/place", *out], "'no/such/place' is neither a folder"),
        (encode, [str(random_cascade.stage_3), *out], "is a StableDiffusionUpscalePipeline"),
        (encode, [str(no_text), *out], "has no text encoder of its own; name Stage I"),
        (encode, [*model, *out[:2], "--out", str(tmp_path)], "must be a file, but is a folder"),
        (encode, [*model, *out[:2], "--out", "/proc/x"], "/proc/x cannot be written ("),
        (encode, [*model, "--prompt", "a\udcff", *out[2:]], "has a byte that is not UTF-8"),
        (encode, [*model, *out, "--device", "meta"], "device 'meta' cannot be used"),
        (generate, [*base, *out, "--embeds", "nowhere"], "nowhere cannot be read"),
        (generate, [*base, *out, "--embeds", str(file)], "no encoding of 'a dog'"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(arguments)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert sentence in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
