"""Results travel and show themselves: pickles, one-line reprs, pictures and tables inline."""

import base64
import io
import pickle
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adapters import CascadeImages, Parts, Sampling, load_cascade, read_info
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.other_tools import ATTENTION, simpletuner
from tests.builders.random_cascade import RandomCascade


class Elements(HTMLParser):
    """The elements of a piece of HTML, with their attributes and text; every one is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.texts.append(text)


def made(count: int = 2, size_px: int = 8, *, prompts: bool = True) -> CascadeImages:
    """Pictures of colours, as if drawn."""
    colours = [((40 * index) % 256, 10, 200) for index in range(count)]
    return CascadeImages(
        stage_1=tuple(Image.new("RGB", (8, 8), colour) for colour in colours),
        stage_2=tuple(Image.new("RGB", (size_px, size_px), colour) for colour in colours),
        stage_3=(),
        prompts=tuple(f'a <b>"{index}"</b> & cat' * prompts for index in range(count)),
        seeds=tuple(range(5, 5 + count)),
        low_res=torch.arange(count * 3 * 8 * 8.0).reshape(count, 3, 8, 8),
        flagged=(False,) * (count - 1) + (True,),
    )


def test_pictures_can_be_pickled() -> None:
    images = made()
    back = pickle.loads(pickle.dumps(images))
    assert back == images
    assert torch.equal(back.low_res, images.low_res)
    assert pickle.loads(pickle.dumps(images[1])) == images[1]


def test_pictures_are_a_sequence_of_samples() -> None:
    images = made(3, size_px=16)
    assert len(images) == len(list(images)) == 3
    assert images[-1] == list(images)[2]
    assert images[1].seed == 6
    assert images[1].prompt == images.prompts[1]
    assert images[1].pictures == {1: images.stage_1[1], 2: images.stage_2[1]}
    assert images[1].final is images.stage_2[1]
    assert [sample.flagged for sample in images] == [False, False, True]
    assert images[1:] == CascadeImages(
        images.stage_1[1:],
        images.stage_2[1:],
        (),
        images.prompts[1:],
        (6, 7),
        images.low_res[1:],
        (False, True),
    )
    with pytest.raises(IndexError):
        images[3]


def test_a_repr_is_one_line_without_pixels() -> None:
    assert repr(made(2)) == (
        "CascadeImages(2 pictures, 8 → 8 px, 1 flagged, of"
        """ 'a <b>"0"</b> & cat', 'a <b>"1"</b> & cat')"""
    )
    assert repr(made(1, prompts=False)) == "CascadeImages(1 picture, 8 → 8 px, 1 flagged)"
    assert repr(made(2)[:0]) == "CascadeImages(0 pictures)"
    assert len(repr(made(100))) < 250
    assert repr(made(2)[0]) == """Sample('a <b>"0"</b> & cat', seed 5, 8 → 8 px)"""
    assert repr(made(2)[1]).endswith(", flagged)")


@pytest.mark.parametrize(("count", "size_px"), [(1, 8), (1, 300), (2, 1024), (7, 1024)])
def test_a_notebook_shows_the_contact_sheet(count: int, size_px: int) -> None:
    images = made(count, size_px)
    elements = Elements(images._repr_html_())
    ((tag, attributes),) = elements.found
    assert tag == "img"
    kind, _, data = (attributes["src"] or "").partition(",")
    assert kind == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert np.array_equal(np.asarray(picture), np.asarray(images.sheet()))
    assert attributes["width"] == str(picture.width)
    assert picture.width <= 1300
    assert attributes["alt"] == ", ".join(sample.title for sample in images)
    assert images[0].title == 'a <b>"0"</b> & cat (seed 5)'


def test_few_large_pictures_are_shown_large() -> None:
    counts = {
        picture: max(count for count, _ in made(n, size_px).sheet().getcolors(2**20)[1:])
        for picture, (n, size_px) in {"tiny": (1, 8), "own": (1, 300), "half": (2, 1024)}.items()
    }
    assert counts["tiny"] >= 192**2
    assert 300**2 <= counts["own"] < 320**2
    assert counts["half"] >= 600**2


def test_of_many_pictures_a_notebook_shows_the_first() -> None:
    elements = Elements(made(30)._repr_html_())
    assert [tag for tag, _ in elements.found] == ["img", "p"]
    assert elements.texts == ["and 6 more"]
    assert (elements.found[0][1]["alt"] or "").count("seed") == 24


def test_no_pictures_show_as_text() -> None:
    assert Elements(made(2)[:0]._repr_html_()).texts == ["CascadeImages(0 pictures)"]


def test_a_sample_shows_its_last_picture() -> None:
    sample = made(2, size_px=16)[1]
    picture = Image.open(io.BytesIO(sample._repr_png_()))
    assert np.array_equal(np.asarray(picture), np.asarray(sample.final))


def test_pictures_of_the_empty_prompt_are_saved_by_seed(tmp_path: Path) -> None:
    assert made(2, prompts=False).save(tmp_path) == tmp_path / "contact_sheet.png"
    assert {path.name for path in tmp_path.iterdir()} == {
        "contact_sheet.png",
        *(f"{index:03d}-seed{5 + index}-stage_{stage}.png" for index in (0, 1) for stage in (1, 2)),
    }


def test_a_cascade_shows_what_it_is_made_of(guarded_cascade: RandomCascade, tmp_path: Path) -> None:
    base, spec = guarded_cascade.stage_1, AdapterSpec()
    export(trained_unet(base, spec), tmp_path, base, 1, spec)
    cascade = load_cascade(base, stage_3=guarded_cascade.stage_3, device="cpu")
    cascade.add_adapter(tmp_path, 0.5)
    unets = {1: cascade.stages[1].unet, 3: cascade.upscaler.unet}
    parameters = {n: sum(p.numel() for p in unet.parameters()) for n, unet in unets.items()}
    rows = [line.split("  ") for line in repr(cascade).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    one, two, three, text, guards = cells[1:]
    size = f"{parameters[1] / 1e6:.1f} M"
    assert one[:6] == ["Stage 1", str(base), "32 px", size, "float32", "cpu"]
    assert f"{tmp_path.name} (0.5)" in one[6]
    assert "0.5" in one[6]
    assert two == ["Stage 2", "none"]
    assert three[:3] == ["Stage 3", str(guarded_cascade.stage_3), "128 px"]
    assert text[:2] == ["text encoder", "T5EncoderModel"]
    assert guards == ["guards", "safety checker, feature extractor, watermarker"]
    cascade.remove_adapters()
    assert str(tmp_path) not in repr(cascade)


def test_a_table_in_a_notebook_has_the_same_cells(random_cascade: RandomCascade) -> None:
    cascade = load_cascade(
        random_cascade.stage_1, random_cascade.stage_2, parts=Parts(text_encoder=False)
    )
    elements = Elements(cascade._repr_html_())
    assert [tag for tag, _ in elements.found].count("tr") == 6
    for text in elements.texts:
        assert text in repr(cascade)
    assert "text encoder  none" in repr(cascade)
    assert "guards        none" in repr(cascade)


def test_a_quantised_base_counts_all_its_parameters(random_cascade: RandomCascade) -> None:
    plain, quantised = (
        repr(
            load_cascade(
                random_cascade.stage_1, dtype=dtype, device="cpu", parts=Parts(text_encoder=False)
            )
        )
        for dtype in ("fp32", "nf4")
    )
    assert "nf4 + float32" in quantised
    assert quantised.replace("nf4 + ", "").split() == plain.split()


def test_adapters_say_what_they_are_in_a_line(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    base, spec = random_cascade.stage_1, AdapterSpec(kind="loha", rank=3)
    exported = export(trained_unet(base, spec), tmp_path, base, 1, spec)
    info, adapter = read_info(exported.folder), StageAdapter.load(exported.folder)
    foreign = StageAdapter.load(simpletuner(trained_unet(base, ATTENTION), tmp_path / "other"))
    assert "Stage 1, loha of rank 3" in repr(adapter)
    assert f"lora of rank {ATTENTION.rank}" in repr(foreign)
    assert "spec=AdapterSpec(kind='loha', rank=3" in repr(info)
    assert "recipe" not in repr(info)
    assert "base_signature" not in repr(info)
    assert "relative Frobenius error" in repr(exported)
    for shown in (info, adapter, foreign, exported, Sampling()):
        assert "\n" not in repr(shown)
        assert len(repr(shown)) < 1000
        assert "tensor(" not in repr(shown)
        back = pickle.loads(pickle.dumps(shown))
        assert repr(back) == repr(shown)
