"""A saved picture records all that it was drawn with, and can be drawn again from that."""

import io
import json
import pickle
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from adapters import Cascade, Sampling, StageSampling, UserError, load_cascade, read_picture_info
from adapters.cascade.provenance import PictureInfo, UsedAdapter
from adapters.errors import __version__
from adapters.files.model_card import load_samples, save_samples
from adapters.generate import main as generate
from adapters.pictures.png import PICTURE_KEY, SHEET_KEY
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.drawing import picture, pixels, right_half
from tests.builders.random_cascade import RandomCascade

FEW = Sampling(
    stage_1=StageSampling(steps=3, guidance=2.5),
    stage_2=StageSampling(steps=2),
    stage_3=StageSampling(steps=2),
)
PROMPT = "A “sks” cât, 猫"


@pytest.fixture(scope="module")
def adapter(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported adapter of both stages."""
    folder = tmp_path_factory.mktemp("runs") / "dog" / "adapters"
    for stage, base in ((1, random_cascade.stage_1), (2, random_cascade.stage_2)):
        export(trained_unet(base, AdapterSpec(rank=4)), folder, base, stage, AdapterSpec(rank=4))
    return folder


@pytest.fixture
def cascade(random_cascade: RandomCascade, adapter: Path) -> Cascade:
    cascade = load_cascade(
        random_cascade.stage_1, random_cascade.stage_2, random_cascade.stage_3, device="cpu"
    )
    cascade.add_adapter(adapter, {1: 0.1 + 0.2, 2: 1.0})
    cascade.add_adapter(adapter, 0.0, name="off")
    return cascade


def save(cascade: Cascade, folder: Path) -> dict[int, Path]:
    """One picture with all there is to say, by stage."""
    images = cascade(
        PROMPT,
        stage_2_prompt="a cat",
        negative_prompt="a dog",
        seed=7,
        sampling=FEW,
        progress=False,
    )
    images.save(folder)
    return {stage: next(folder.glob(f"000-*-stage_{stage}.png")) for stage in (1, 2, 3)}


def test_each_stages_picture_says_what_it_was_drawn_with(
    cascade: Cascade, random_cascade: RandomCascade, adapter: Path, tmp_path: Path
) -> None:
    saved = save(cascade, tmp_path)
    info = read_picture_info(saved[3])
    assert (info.stage, info.seed, info.negative_prompt) == (3, 7, "a dog")
    assert info.prompts == {1: PROMPT, 2: "a cat", 3: "a cat"}
    assert info.models == {n: str(path) for n, path in enumerate(vars(random_cascade).values(), 1)}
    assert info.precisions == dict.fromkeys((1, 2, 3), "float32")
    assert info.adapters == {"dog": UsedAdapter(source=str(adapter), scales={1: 0.1 + 0.2, 2: 1.0})}
    assert info.sampling == FEW
    assert (info.way, info.strength, info.version) == ("text", {}, __version__)
    for stage, path in saved.items():
        own = read_picture_info(path)
        assert own == info.of_stage(stage)
        assert own.stage == stage
        assert list(own.prompts) == list(own.models) == list(range(1, stage + 1))
        texts = Image.open(path).text
        assert texts.keys() == {"prompt", "seed", PICTURE_KEY}
        assert (texts["prompt"], texts["seed"]) == (own.prompt, "7")
        assert json.loads(texts[PICTURE_KEY])["sampling"]["stage_1"]["guidance"] == 2.5
    assert read_picture_info(saved[1]).adapters["dog"].scales == {1: 0.1 + 0.2}


def test_results_know_their_adapters_and_travel(cascade: Cascade) -> None:
    images = cascade("a cat", images_per_prompt=2, sampling=FEW, progress=False)
    assert repr(images).endswith("of 'a cat', with dog (1:0.3,2:1))")
    back = pickle.loads(pickle.dumps(images))
    assert back == images
    assert [info.seed for info in back[1:].infos] == [1]
    assert back[1].info == images.infos[1]
    cascade.set_adapters({"off": 0.5})
    assert "with off (0.5)" in repr(cascade("a cat", sampling=FEW, progress=False))
    cascade.remove_adapters()
    plain = cascade("a cat", sampling=FEW, progress=False)
    assert "with" not in repr(plain)
    assert plain.infos[0].adapters == {}


def test_a_combined_adapter_says_what_it_was_made_of(cascade: Cascade) -> None:
    cascade.combine({"dog": 1.0, "off": 0.5}, "linear", name="both")
    cascade.set_adapters({"both": 1.0})
    images = cascade("a cat", sampling=FEW, progress=False)
    assert images.infos[0].adapters["both"].source == "linear of dog, off"


def test_a_picture_from_a_picture_says_so(cascade: Cascade, tmp_path: Path) -> None:
    options = {"sampling": FEW, "progress": False}
    images = cascade.inpaint(picture(), right_half(), "a cat", strength={1: 0.5}, **options)
    images[0].save(tmp_path / "one.PNG", stage=1)
    info = read_picture_info(tmp_path / "one.PNG")
    assert (info.way, info.strength) == ("inpaint", {1: 0.5})
    assert images[0].info is not None
    assert images[0].info.strength == {1: 0.5, 2: 0.8}


def test_enlarged_pictures_name_the_stages_that_drew(cascade: Cascade) -> None:
    cascade.upscaler = None
    low_res = cascade("a cat", sampling=FEW, progress=False).low_res
    enlarged = cascade("a cat", sampling=FEW, low_res=low_res, progress=False)
    assert list(enlarged.infos[0].models) == [2]


def test_pictures_of_version_0_1_are_read(tmp_path: Path) -> None:
    """Their settings are flat."""
    old = {"stage": 2, "models": {"1": "a", "2": "b"}, "precisions": {}, "version": "0.1.0"}
    flat = {"stage_1_timesteps": "fast27", "stage_1_steps": 27, "noise_level": 100}
    text = PngImagePlugin.PngInfo()
    text.add_itxt(PICTURE_KEY, json.dumps(old | {"sampling": flat | {"batch_size": 4}}))
    Image.new("RGB", (4, 4)).save(tmp_path / "old.png", pnginfo=text)
    expected = Sampling(
        stage_1=StageSampling(timesteps="fast27"),
        stage_2=StageSampling(noise_level=100),
        batch_size=4,
    )
    assert read_picture_info(tmp_path / "old.png").sampling == expected


def test_a_single_picture_is_saved_as_png(cascade: Cascade, tmp_path: Path) -> None:
    sample = cascade("a cat", sampling=FEW, progress=False)[0]
    with pytest.raises(UserError, match=r"must end in \.png"):
        sample.save(tmp_path / "cat.jpg")
    sample.save(tmp_path / "deep" / "cat.png")
    saved = Image.open(tmp_path / "deep" / "cat.png")
    assert np.array_equal(pixels(saved), pixels(sample.final))


def test_every_picture_says_what_it_was_drawn_with(cascade: Cascade, tmp_path: Path) -> None:
    images = cascade("a cat", images_per_prompt=2, sampling=FEW, progress=False)
    sample = images[1]
    assert sample.info is not None
    images.final[1].save(tmp_path / "plain.png")
    pickle.loads(pickle.dumps(images)).stage_1[1].save(tmp_path / "pickled.png")
    (tmp_path / "shown.png").write_bytes(sample._repr_png_())
    (tmp_path / "shown_plain.png").write_bytes(images.final[1]._repr_png_())
    for name, stage in (("plain", 3), ("pickled", 1), ("shown", 3), ("shown_plain", 3)):
        assert read_picture_info(tmp_path / f"{name}.png") == sample.info.of_stage(stage)
    images.final[1].save(tmp_path / "other.jpg")
    assert Image.open(tmp_path / "other.jpg").size == images.final[1].size
    inline = re.search(r"base64,([^\"]+)", images._repr_html_())
    assert inline is not None
    for sheet in (images.save(tmp_path / "saved"), io.BytesIO(b64decode(inline[1]))):
        said = json.loads(Image.open(sheet).text[SHEET_KEY])
        assert [PictureInfo.model_validate(one, strict=False) for one in said] == [*images.infos]


def test_a_cards_samples_say_what_they_were_drawn_with(cascade: Cascade, tmp_path: Path) -> None:
    images = cascade("a cat", sampling=FEW, progress=False)
    folder = tmp_path / "adapters"
    save_samples(folder, {"a cat": images.final[0]})
    assert read_picture_info(folder / "samples" / "00.png") == images.infos[0]
    (folder / "README.md").write_text("![a cat](samples/00.png) a cat\n")
    save_samples(folder, load_samples(folder))
    assert read_picture_info(folder / "samples" / "00.png") == images.infos[0]


def test_what_says_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.png cannot be read"):
        read_picture_info(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png cannot be read"):
        read_picture_info(tmp_path / "text.png")
    for name in ("plain.png", "photo.jpg"):
        picture().save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} does not say what it was drawn with"):
            read_picture_info(tmp_path / name)


def drawn(folder: Path, stage: int, name: str = "000") -> np.ndarray:
    (path,) = folder.glob(f"{name}-*-stage_{stage}.png")
    return pixels(Image.open(path))


def test_a_saved_picture_is_drawn_anew(cascade: Cascade, tmp_path: Path) -> None:
    saved = save(cascade, tmp_path / "first")
    for stage, path in saved.items():
        again = tmp_path / f"again_{stage}"
        generate(["--like", str(path), "--device", "cpu", "--out", str(again)])
        assert len(list(again.glob("*-stage_*.png"))) == stage
        assert np.array_equal(drawn(again, stage), drawn(tmp_path / "first", stage))
        written = next(again.glob(f"000-*-stage_{stage}.png"))
        assert read_picture_info(written) == read_picture_info(path)


def test_what_else_is_given_replaces_a_pictures_own(cascade: Cascade, tmp_path: Path) -> None:
    path = save(cascade, tmp_path / "first")[1]
    own = ["--prompt", "a dog", "--seed", "9", "--stage-1-timesteps", "fast27", "--adapter"]
    source = f"{read_picture_info(path).adapters['dog'].source}=0.25"
    generate(["--like", str(path), *own, source, "--out", str(tmp_path / "again")])
    info = read_picture_info(tmp_path / "again" / "000-a-dog-seed9-stage_1.png")
    assert info.prompts == {1: "a dog"}
    assert info.sampling == FEW.but(stage_1=StageSampling(timesteps="fast27"))
    assert info.adapters["dog"].scales == {1: 0.25}


def test_a_picture_from_a_picture_is_drawn_anew_from_it(
    cascade: Cascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    picture().save(start)
    right_half().save(mask)
    images = cascade.inpaint(
        picture(), right_half(), "a cat", strength={1: 0.7}, sampling=FEW, progress=False
    )
    images[0].save(tmp_path / "one.png", stage=1)
    like = ["--like", str(tmp_path / "one.png"), "--out", str(tmp_path / "again")]
    for given, missing in (([], "--image and --mask"), (["--image", str(start)], "--mask")):
        with pytest.raises(SystemExit):
            generate([*like, *given])
        assert f"draw from a picture, give {missing} too" in capsys.readouterr().err
    generate([*like, "--image", str(start), "--mask", str(mask)])
    assert np.array_equal(drawn(tmp_path / "again", 1), pixels(images.stage_1[0]))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--out drawn", "nothing to draw; give --prompt, or a picture with --like"),
        ("--like plain.png --out drawn", "plain.png does not say what it was drawn with"),
    ],
)
def test_mistakes_are_one_sentence(
    flags: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("plain.png")
    with pytest.raises(SystemExit) as caught:
        generate(flags.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert sentence in error
    assert error.count("\n") == 1
