"""Image-to-image and inpainting: what diffusers' own pipelines draw, with all a cascade adds."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFInpaintingSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
)
from PIL import Image
from torch import Tensor

from adapters import Cascade, CascadeImages, Parts, Sampling, StageSampling, UserError, load_cascade
from adapters.cascade.redraw import WAYS, Redraw
from adapters.generate import main as generate
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.drawing import largest_difference, picture, pixels, right_half
from tests.builders.random_cascade import RandomCascade

FEW = Sampling(
    stage_1=StageSampling(steps=4, guidance=3.0),
    stage_2=StageSampling(steps=4, guidance=2.0, noise_level=100),
    stage_3=StageSampling(steps=2),
)

STAGE_1 = {"num_inference_steps": 4, "guidance_scale": 3.0}

STAGE_2 = {"num_inference_steps": 4, "guidance_scale": 2.0, "noise_level": 100}

PROMPT = "a cat"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def plain(kind: type[DiffusionPipeline], folder: Path) -> DiffusionPipeline:
    """A pipeline of diffusers alone."""
    parts = DiffusionPipeline.from_pretrained(folder).components
    return kind(**parts, requires_safety_checker=False)


def both(pipe: DiffusionPipeline, **arguments: Any) -> tuple[Tensor, Image.Image]:
    """What a plain pipeline draws: pixels, and the finished picture."""
    drawn = (
        pipe(prompt=PROMPT, generator=generator(), output_type=kind, **arguments).images
        for kind in ("pt", "pil")
    )
    pixels, pictures = drawn
    return pixels, pictures[0]


@pytest.fixture
def cascade(random_cascade: RandomCascade) -> Cascade:
    return load_cascade(random_cascade.stage_1, random_cascade.stage_2)


def img2img(cascade: Cascade, image: Image.Image, strength: float = 0.5) -> CascadeImages:
    options = {"seed": 5, "sampling": FEW, "progress": False}
    return cascade.img2img(image, PROMPT, strength=strength, **options)


def test_img2img_draws_what_the_plain_pipelines_draw(random_cascade: RandomCascade) -> None:
    start = picture()
    low_res, one = both(
        plain(IFImg2ImgPipeline, random_cascade.stage_1),
        image=start,
        strength=0.5,
        **STAGE_1,
    )
    middle, two = both(
        plain(IFImg2ImgSuperResolutionPipeline, random_cascade.stage_2),
        image=low_res,
        original_image=start,
        strength=0.75,
        **STAGE_2,
    )
    upscaler = StableDiffusionUpscalePipeline.from_pretrained(random_cascade.stage_3)
    enlarged = (middle / 2 + 0.5).clamp(0, 1)
    three = upscaler(PROMPT, enlarged, num_inference_steps=2, generator=generator()).images[0]

    cascade = load_cascade(random_cascade.stage_1, random_cascade.stage_2, random_cascade.stage_3)
    images = cascade.img2img(
        start, PROMPT, strength={1: 0.5, 2: 0.75}, seed=5, sampling=FEW, progress=False
    )
    assert torch.equal(images.low_res, low_res)
    for drawn, expected in zip(images[0].pictures.values(), (one, two, three), strict=True):
        assert np.array_equal(pixels(drawn), pixels(expected))


def test_inpainting_draws_what_the_plain_pipelines_draw(
    random_cascade: RandomCascade, cascade: Cascade
) -> None:
    start, mask = picture(), right_half()
    low_res, one = both(
        plain(IFInpaintingPipeline, random_cascade.stage_1),
        image=start,
        mask_image=mask,
        strength=0.5,
        **STAGE_1,
    )
    _, two = both(
        plain(IFInpaintingSuperResolutionPipeline, random_cascade.stage_2),
        image=low_res,
        original_image=start,
        mask_image=mask,
        strength=0.5,
        **STAGE_2,
    )
    options = {"seed": 5, "sampling": FEW, "progress": False}
    images = cascade.inpaint(start, mask, PROMPT, strength=0.5, **options)
    assert torch.equal(images.low_res, low_res)
    assert np.array_equal(pixels(images.stage_1[0]), pixels(one))
    assert np.array_equal(pixels(images.stage_2[0]), pixels(two))


def test_the_defaults_are_the_pipelines_own() -> None:
    names = {"num_inference_steps", "guidance_scale", "noise_level"}
    for drawing in WAYS.values():
        for stage in (1, 2):
            parameters = inspect.signature(drawing.pipelines[stage].__call__).parameters
            default = {name: parameters[name].default for name in names & parameters.keys()}
            assert drawing.sampling.arguments(stage) == default
            if drawing.strength:
                assert drawing.strength[stage] == parameters["strength"].default
    assert Redraw.of(picture(), strength={2: 0.3}).strength == {1: 0.7, 2: 0.3}


def test_what_is_not_masked_stays(cascade: Cascade) -> None:
    start = picture()
    options = {"sampling": FEW, "progress": False}
    images = cascade.inpaint(start, right_half(), PROMPT, **options)
    for drawn in images[0].pictures.values():
        original = start.resize(drawn.size, Image.Resampling.BICUBIC)
        kept = drawn.width // 4
        assert np.array_equal(pixels(drawn)[:, :kept], pixels(original)[:, :kept])
        assert not np.array_equal(pixels(drawn)[:, -kept:], pixels(original)[:, -kept:])


def test_the_recorded_forward_pass_draws_the_strengths_share_of_the_steps(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {1: 0, 2: 0}
    for stage, recorded in cascade.recorded.items():

        def counting(stage: int = stage, own: Any = recorded.function, **inputs: Tensor) -> Tensor:
            steps[stage] += 1
            return own(**inputs)

        monkeypatch.setattr(recorded, "function", counting)
    options = {"sampling": FEW, "progress": False}
    cascade.img2img(picture(), PROMPT, strength={1: 0.5, 2: 1.0}, **options)
    assert steps == {1: 2, 2: 4}
    spaced = FEW.but(stage_1=StageSampling(timesteps="fast27"))
    cascade.img2img(picture(), PROMPT, strength={1: 0.5, 2: 0.25}, sampling=spaced, progress=False)
    assert steps == {1: 2 + 13, 2: 4 + 1}


def test_a_picture_does_not_depend_on_its_batch(cascade: Cascade) -> None:
    prompts, starts = ["a cat", "a dog", "a cat on blue"], [picture(seed) for seed in range(3)]
    together, apart = (
        cascade.inpaint(
            starts, right_half(), prompts, seed=3, sampling=FEW.but(batch_size=size), progress=False
        )
        for size in (3, 2)
    )
    alone = cascade.inpaint(
        starts[2], right_half(), prompts[2], seed=5, sampling=FEW, progress=False
    )
    for row in range(3):
        assert largest_difference(together.final[row], apart.final[row]) <= 1
    assert largest_difference(alone.final[0], together.final[2]) <= 1
    assert largest_difference(together.final[0], together.final[1]) > 1


def test_one_picture_is_for_all_prompts_and_their_pictures(cascade: Cascade) -> None:
    options = {"sampling": FEW, "progress": False, "images_per_prompt": 2}
    images = cascade.img2img(picture(), ["a cat", "a dog"], strength=0.25, **options)
    assert images.prompts == ("a cat", "a cat", "a dog", "a dog")
    again = cascade.img2img([picture()] * 2, ["a cat", "a dog"], strength=0.25, **options)
    assert torch.equal(images.low_res, again.low_res)


def test_a_wide_picture_stays_wide(random_cascade: RandomCascade) -> None:
    cascade = load_cascade(random_cascade.stage_1, random_cascade.stage_2, random_cascade.stage_3)
    start, mask = picture(0, 80, 40), right_half(80, 40)
    images = cascade.inpaint(start, mask, PROMPT, sampling=FEW, progress=False)
    sizes = [image.size for image in images[0].pictures.values()]
    assert sizes == [(32, 16), (128, 64), (512, 256)]


def test_strength_is_how_far_it_goes(cascade: Cascade) -> None:
    start = picture()
    original = pixels(start.resize((16, 16), Image.Resampling.BICUBIC))
    fine = FEW.but(stage_1=StageSampling(steps=50))
    near, far = (
        cascade.img2img(
            start, PROMPT, strength={1: strength}, sampling=fine, progress=False
        ).stage_1[0]
        for strength in (0.04, 1.0)
    )
    assert np.abs(pixels(near) - original).mean() < np.abs(pixels(far) - original).mean() / 2


def test_an_adapter_has_its_effect_and_goes_without_a_trace(
    random_cascade: RandomCascade, cascade: Cascade, tmp_path: Path
) -> None:
    base, spec = random_cascade.stage_1, AdapterSpec(rank=4, alpha=6.0)
    unet = trained_unet(base, spec)
    export(unet, tmp_path, base, 1, spec)
    before = img2img(cascade, picture())
    cascade.add_adapter(tmp_path)
    adapted = img2img(cascade, picture())
    trained = load_cascade(base, parts=Parts(unets={1: unet})).img2img(
        picture(), PROMPT, strength=0.5, seed=5, sampling=FEW, progress=False
    )
    assert largest_difference(adapted.stage_1[0], before.stage_1[0]) > 1
    assert largest_difference(adapted.stage_1[0], trained.stage_1[0]) <= 1
    cascade.remove_adapters()
    assert torch.equal(img2img(cascade, picture()).low_res, before.low_res)


def test_guards_are_kept_and_run(guarded_cascade: RandomCascade) -> None:
    cascade = load_cascade(guarded_cascade.stage_1, guarded_cascade.stage_2)
    for pipe in cascade.stages.values():
        for head in (pipe.safety_checker.p_head, pipe.safety_checker.w_head):
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.constant_(head.bias, -1.0)
    clean = img2img(cascade, picture())
    assert clean.flagged == (False,)
    for drawn in clean[0].pictures.values():
        assert (pixels(drawn) == 255).all(axis=2).any(), "the fixture's watermark is white"
    for pipe in cascade.stages.values():
        torch.nn.init.constant_(pipe.safety_checker.p_head.bias, 1.0)
    flagged = cascade.inpaint(picture(), right_half(), PROMPT, sampling=FEW, progress=False)
    assert flagged.flagged == (True,)
    for drawn in flagged[0].pictures.values():
        assert pixels(drawn)[: drawn.height // 2].max() == 0


def test_the_modules_are_shared_and_stay_as_they_were(cascade: Cascade) -> None:
    components = {number: dict(pipe.components) for number, pipe in cascade.stages.items()}
    unets = {number: pipe.unet.training for number, pipe in cascade.stages.items()}
    generated = cascade(PROMPT, seed=5, sampling=FEW, progress=False)
    img2img(cascade, picture())
    for number, pipe in cascade.stages.items():
        for name, component in pipe.components.items():
            assert component is components[number][name]
        assert "forward" not in vars(pipe.unet)
        assert pipe.unet.training == unets[number]
    again = cascade(PROMPT, seed=5, sampling=FEW, progress=False)
    assert torch.equal(again.low_res, generated.low_res)


def test_given_low_res_pictures_and_an_original_skip_stage_1(
    random_cascade: RandomCascade, cascade: Cascade
) -> None:
    images = img2img(cascade, picture())
    second = load_cascade(None, random_cascade.stage_2)
    again = second(
        PROMPT,
        seed=5,
        sampling=FEW,
        low_res=images.low_res,
        redraw=Redraw.of(picture(), strength=0.5),
        progress=False,
    )
    assert np.array_equal(pixels(again.stage_2[0]), pixels(images.stage_2[0]))


def test_pictures_in_any_mode_are_flattened_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    grey = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    for image in Redraw.of([clear, grey]).pictures:
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("pictures", "masks", "strength", "sentence"),
    [
        ([(40, 40), (40, 20)], None, 0.5, "one size .found 40 x 40, 40 x 20 px"),
        ([(40, 40)], [(20, 20)], 0.5, "one size .found 40 x 40, 20 x 20 px"),
        (
            [(40, 40)] * 3,
            [(40, 40)] * 2,
            0.5,
            r"masks must be one for all pictures, or one for each of the 3 \(got 2\)",
        ),
        ([(40, 40)] * 3, None, 0.5, r"pictures to start from must be .* each of the 2 \(got 3\)"),
        ([], None, 0.5, r"pictures to start from must be .* each of the 2 \(got 0\)"),
        ([(40, 40)], None, 0, r"strength must be above 0 and at most 1, .* \(got 0\)"),
        ([(40, 40)], None, 1.1, r"strength must be above 0 and at most 1, .* \(got 1.1\)"),
        ([(40, 40)], None, float("nan"), "strength must be above 0"),
        ([(40, 40)], None, {3: 0.5}, "or for Stage 1 and 2"),
        ([(40, 40)], None, 0.2, "0.2 leaves none of the 4 steps of Stage 1"),
        ([(40, 40)], None, {1: 1.0, 2: 0.2}, "0.2 leaves none of the 4 steps of Stage 2"),
    ],
)
def test_mistakes_are_said(
    cascade: Cascade,
    pictures: list[tuple[int, int]],
    masks: list[tuple[int, int]] | None,
    strength: Any,
    sentence: str,
) -> None:
    starts = [Image.new("RGB", size) for size in pictures]
    covers = None if masks is None else [Image.new("L", size) for size in masks]
    with pytest.raises(UserError, match=sentence):
        cascade(["a cat", "a dog"], redraw=Redraw.of(starts, covers, strength), sampling=FEW)


def test_a_picture_is_given_as_its_file_too(cascade: Cascade, tmp_path: Path) -> None:
    picture().save(tmp_path / "start.png")
    drawn = img2img(cascade, picture())
    for given in (tmp_path / "start.png", str(tmp_path / "start.png")):
        again = img2img(cascade, given)
        assert np.array_equal(pixels(again.final[0]), pixels(drawn.final[0]))
    with pytest.raises(UserError, match=r"nowhere\.png cannot be read"):
        cascade.img2img("nowhere.png", "a cat")
    with pytest.raises(UserError, match=r"must be a PIL image or a file \(got a ndarray\)"):
        cascade.img2img(np.zeros((8, 8, 3)), "a cat")


def test_inpainting_without_a_mask_is_no_img2img(cascade: Cascade) -> None:
    with pytest.raises(UserError, match="There is no mask; give one, or call img2img"):
        cascade.inpaint(picture(), None, "a cat")


def test_the_command_line_redraws(random_cascade: RandomCascade, tmp_path: Path) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    picture().save(start)
    right_half().save(mask)
    steps = "--stage-1-steps 4 --stage-1-guidance 3 --stage-2-steps 4 --stage-2-guidance 2"
    base = f"--stage-1 {random_cascade.stage_1} --stage-2 {random_cascade.stage_2} --seed 5"
    flags = [*base.split(), *steps.split(), "--noise-level", "100", "--prompt", PROMPT]
    generate([*flags, "--image", str(start), "--strength", "0.5", "--out", str(tmp_path / "a")])
    by_stage = ["--strength", "1:0.5,2:1", "--mask", str(mask)]
    generate([*flags, "--image", str(start), *by_stage, "--out", str(tmp_path / "b")])
    cascade = load_cascade(random_cascade.stage_1, random_cascade.stage_2)
    options = {"seed": 5, "sampling": FEW, "progress": False}
    expected = {
        "a": img2img(cascade, picture()),
        "b": cascade.inpaint(picture(), right_half(), PROMPT, strength={1: 0.5, 2: 1.0}, **options),
    }
    for folder, images in expected.items():
        drawn = Image.open(tmp_path / folder / "000-a-cat-seed5-stage_2.png")
        assert np.array_equal(pixels(drawn), pixels(images.final[0]))


def test_the_command_line_enlarges_with_stage_2_alone(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    start, spec = tmp_path / "start.png", AdapterSpec()
    small = picture().resize((16, 16))
    small.save(start)
    for stage, base in ((1, random_cascade.stage_1), (2, random_cascade.stage_2)):
        export(trained_unet(base, spec), tmp_path / "adapters", base, stage, spec)
    flags = f"--adapter {tmp_path / 'adapters'} --low-res {start} --out {tmp_path / 'drawn'}"
    generate([*flags.split(), "--stage-2-steps", "2", "--prompt", PROMPT])
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["000-a-cat-seed0-stage_2.png", "contact_sheet.png"]
    second = load_cascade(None, random_cascade.stage_2, adapters=tmp_path / "adapters")
    images = second(
        PROMPT, low_res=small, sampling=Sampling(stage_2=StageSampling(steps=2)), progress=False
    )
    assert np.array_equal(
        pixels(images.final[0]), pixels(Image.open(tmp_path / "drawn" / names[0]))
    )
    assert np.array_equal(((images.low_res[0] + 1) * 127.5).round().permute(1, 2, 0), small)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--low-res nowhere.png", "nowhere.png cannot be read"),
        ("--mask mask.png", "draw from a picture, give --image too"),
        ("--strength 0.5", "draw from a picture, give --image too"),
        ("--image nowhere.png", "nowhere.png cannot be read"),
        ("--image text.png", "text.png cannot be read"),
        ("--image start.png --strength much", "--strength must be a number up to 1"),
        ("--image start.png --strength 2", "strength must be above 0 and at most 1"),
    ],
)
def test_mistakes_of_the_command_line(
    flags: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("start.png")
    Path("text.png").write_text("no picture")
    with pytest.raises(SystemExit) as caught:
        generate(["--stage-1", "x/y", "--prompt", "a cat", *flags.split(), "--out", "drawn"])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert not Path("drawn").exists()
