"""The cascade draws what the published pipelines draw, and adapters go in and out of it cleanly."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from adapters import Cascade, Parts, load_cascade
from adapters.base.source import Source
from adapters.base.stored_unet import StoredUNet
from adapters.cascade.sampling import Sampling, StageSampling
from adapters.errors import UserError
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.drawing import FEW_STEPS, PROMPT, draw, largest_difference, pixels
from tests.builders.random_cascade import RandomCascade, save_random_cascade

SPECS = [
    AdapterSpec(kind="lora", rank=4, alpha=6.0, targets="attention+conv"),
    AdapterSpec(kind="rslora", rank=4, alpha=6.0),
    AdapterSpec(kind="dora", rank=4, alpha=6.0, targets="attention+conv"),
    AdapterSpec(kind="loha", rank=4, alpha=6.0, targets="attention+conv"),
    AdapterSpec(kind="lokr", rank=4, alpha=6.0, targets="attention+conv"),
    AdapterSpec(kind="oft", rank=4),
]


def weights(cascade: Cascade) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": tensor.clone()
        for number, pipe in cascade.stages.items()
        for name, tensor in pipe.unet.state_dict().items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def cascade(random_cascade: RandomCascade) -> Cascade:
    return load_cascade(random_cascade.stage_1, random_cascade.stage_2)


@pytest.fixture(scope="module")
def adapter(random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported adapter of both stages."""
    folder = tmp_path_factory.mktemp("adapter")
    for stage, base in ((1, random_cascade.stage_1), (2, random_cascade.stage_2)):
        export(trained_unet(base, SPECS[0]), folder, base, stage, SPECS[0])
    return folder


def test_pictures_are_those_of_the_plain_pipelines(random_cascade: RandomCascade) -> None:
    plain_1 = IFPipeline.from_pretrained(random_cascade.stage_1)
    plain_2 = IFSuperResolutionPipeline.from_pretrained(random_cascade.stage_2)
    plain_3 = StableDiffusionUpscalePipeline.from_pretrained(random_cascade.stage_3)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0}
    low_res = plain_1(
        PROMPT, generator=torch.Generator().manual_seed(5), output_type="pt", **settings
    ).images
    picture_1 = plain_1(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images[0]
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "noise_level": 100}
    middle, picture_2 = (
        plain_2(
            PROMPT,
            image=low_res,
            generator=torch.Generator().manual_seed(5),
            output_type=output_type,
            **settings,
        ).images
        for output_type in ("pt", "pil")
    )
    picture_3 = plain_3(
        PROMPT,
        image=(middle / 2 + 0.5).clamp(0, 1),
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=2,
        guidance_scale=5.0,
        noise_level=20,
    ).images[0]

    images = draw(
        load_cascade(random_cascade.stage_1, random_cascade.stage_2, random_cascade.stage_3)
    )
    assert torch.equal(images.low_res, low_res)
    assert np.array_equal(pixels(images.stage_1[0]), pixels(picture_1))
    assert np.array_equal(pixels(images.stage_2[0]), pixels(picture_2[0]))
    assert np.array_equal(pixels(images.stage_3[0]), pixels(picture_3))
    assert images.final == images.stage_3
    assert images.prompts == (PROMPT,)


def test_the_text_path_is_the_pipelines(random_cascade: RandomCascade) -> None:
    plain = IFPipeline.from_pretrained(random_cascade.stage_1)
    cascade = load_cascade(random_cascade.stage_1)
    cleaned, _ = plain.encode_prompt(PROMPT, False, clean_caption=True)
    raw, _ = plain.encode_prompt(PROMPT, False, clean_caption=False)
    assert torch.equal(cascade.encode([PROMPT]), cleaned)
    assert torch.equal(cascade.encode([PROMPT], clean_caption=False), raw)
    assert not torch.equal(cleaned, raw)


def test_later_stages_may_be_told_something_else(
    random_cascade: RandomCascade, cascade: Cascade
) -> None:
    plain = IFSuperResolutionPipeline.from_pretrained(random_cascade.stage_2)
    told = {"stage_2_prompt": ["a dog", "a cat"], "sampling": FEW_STEPS, "progress": False}
    images = cascade(["a sks dog", "a sks cat"], seed=5, **told)
    same = cascade(["a sks dog", "a sks cat"], seed=5, sampling=FEW_STEPS, progress=False)
    assert torch.equal(images.low_res, same.low_res)
    assert images.prompts == ("a sks dog", "a sks cat")
    for row, prompt in enumerate(["a dog", "a cat"]):
        (expected,) = plain(
            prompt,
            image=images.low_res[row : row + 1],
            generator=torch.Generator().manual_seed(5 + row),
            num_inference_steps=2,
            guidance_scale=2.0,
            noise_level=100,
        ).images
        assert largest_difference(images.stage_2[row], expected) <= 1
        assert largest_difference(images.stage_2[row], same.stage_2[row]) > 1
    for_all = cascade(["a sks dog", "a sks cat"], seed=5, **told | {"stage_2_prompt": "a dog"})
    assert largest_difference(for_all.stage_2[0], images.stage_2[0]) <= 1
    with pytest.raises(
        UserError, match=r"prompts for Stage 2 must be one for all prompts, .* of the 2 \(got 3\)"
    ):
        cascade(["a", "b"], stage_2_prompt=["a", "b", "c"])


def test_stage_3_is_told_what_stage_2_is(random_cascade: RandomCascade) -> None:
    cascade = load_cascade(random_cascade.stage_1, random_cascade.stage_2, random_cascade.stage_3)
    heard: list[str] = []
    encode_prompt = cascade.upscaler.encode_prompt

    def listening(prompt: list[str], *arguments: object, **options: object) -> object:
        heard.extend(prompt)
        return encode_prompt(prompt, *arguments, **options)

    cascade.upscaler.encode_prompt = listening
    options = {"sampling": FEW_STEPS, "progress": False}
    cascade("a sks dog", **options)
    cascade("a sks dog", stage_2_prompt="a dog", images_per_prompt=2, **options)
    cascade("a sks dog", stage_2_prompt="a dog", stage_3_prompt="a pet", **options)
    cascade("a sks dog", stage_3_prompt="a pet", **options)
    assert heard == ["a sks dog", "a dog", "a dog", "a pet", "a pet"]


def test_encodings_of_each_stage_are_its_own(cascade: Cascade) -> None:
    texts = ["a sks dog", "a dog", ""]
    embeds = {text: cascade.encode([text])[0] for text in texts}
    options = {"seed": 5, "sampling": FEW_STEPS, "progress": False}
    images = cascade("a sks dog", stage_2_prompt="a dog", embeds=embeds, **options)
    expected = cascade("a sks dog", stage_2_prompt="a dog", **options)
    assert np.array_equal(pixels(images.final[0]), pixels(expected.final[0]))
    same = cascade("a sks dog", embeds=embeds, **options)
    assert largest_difference(images.final[0], same.final[0]) > 1


def test_a_picture_does_not_depend_on_its_batch(cascade: Cascade) -> None:
    prompts = ["a cat", "a dog", "a cat on blue"]
    settings = {"seed": [3, 4, 5], "progress": False}
    together = cascade(prompts, sampling=FEW_STEPS, **settings)
    in_twos = FEW_STEPS.model_copy(update={"batch_size": 2})
    apart = cascade(prompts, sampling=in_twos, **settings)
    assert apart.prompts == together.prompts
    assert apart.seeds == together.seeds == (3, 4, 5)
    torch.testing.assert_close(apart.low_res, together.low_res, rtol=0, atol=1e-3)
    for one, other in zip(apart.stage_2, together.stage_2, strict=True):
        assert largest_difference(one, other) <= 1
    assert largest_difference(together.stage_1[0], together.stage_1[1]) > 1


def test_images_per_prompt_have_seeds_of_their_own(random_cascade: RandomCascade) -> None:
    cascade = load_cascade(random_cascade.stage_1)
    settings = {"sampling": FEW_STEPS, "progress": False}
    images = cascade(["a cat", "a dog"], seed=3, images_per_prompt=2, **settings)
    assert images.prompts == ("a cat", "a cat", "a dog", "a dog")
    assert images.seeds == (3, 4, 5, 6)
    assert images.stage_2 == images.stage_3 == ()
    alone = cascade("a dog", seed=5, **settings)
    assert largest_difference(images.final[2], alone.final[0]) <= 1


def test_given_low_res_pictures_skip_stage_1(
    random_cascade: RandomCascade, cascade: Cascade
) -> None:
    images = draw(cascade)
    second = load_cascade(None, random_cascade.stage_2)
    again = second(PROMPT, seed=5, sampling=FEW_STEPS, low_res=images.low_res, progress=False)
    assert again.stage_1 == ()
    assert np.array_equal(pixels(again.stage_2[0]), pixels(images.stage_2[0]))


def test_what_is_missing_is_said(random_cascade: RandomCascade) -> None:
    without_text = load_cascade(None, random_cascade.stage_2, parts=Parts(text_encoder=False))
    with pytest.raises(UserError, match="load it with its text encoder"):
        without_text("a cat", low_res=torch.zeros(1, 3, 16, 16))
    embeds = {"a cat": torch.ones(7, 32), "": torch.zeros(7, 32)}
    with pytest.raises(UserError, match="Stage I was not loaded"):
        without_text("a cat", embeds=embeds)
    first = load_cascade(random_cascade.stage_1, parts=Parts(text_encoder=False))
    with pytest.raises(UserError, match="load Stage II too"):
        first("a cat", embeds=embeds, low_res=torch.zeros(1, 3, 16, 16))
    with pytest.raises(
        UserError, match=r"low_res pictures must be one for all .* of the 1 \(got 2\)"
    ):
        without_text("a cat", embeds=embeds, low_res=torch.zeros(2, 3, 16, 16))
    with pytest.raises(UserError, match="at least one model"):
        load_cascade()
    with pytest.raises(UserError, match="'no/such/place' is neither a folder"):
        load_cascade("no/such/place")
    with pytest.raises(UserError, match="Stage 1 needs a model of class IFPipeline, but"):
        load_cascade(random_cascade.stage_2)


@pytest.mark.parametrize(
    "read",
    [
        lambda source: source.pipeline(torch.float32),
        lambda source: source.unet("fp32", torch.device("cpu")),
        lambda source: source.scheduler("scheduler"),
        lambda source: source.picture_size_px,
    ],
    ids=["pipeline", "unet", "scheduler", "picture_size_px"],
)
def test_swapped_stages_are_said_whatever_is_read(
    random_cascade: RandomCascade, read: Callable[[Source], object]
) -> None:
    read(Source(str(random_cascade.stage_1), 1))
    with pytest.raises(UserError, match="Stage 2 needs a model of class IFSuperResolutionPipeline"):
        read(Source(str(random_cascade.stage_1), 2))


def test_the_schedulers_of_a_source_are_the_pipelines(random_cascade: RandomCascade) -> None:
    source = Source(str(random_cascade.stage_2), 2)
    pipe = IFSuperResolutionPipeline.from_pretrained(random_cascade.stage_2)
    for name in ("scheduler", "image_noising_scheduler"):
        assert source.scheduler(name).config == pipe.components[name].config
    with pytest.raises(UserError, match="cannot be loaded"):
        source.scheduler("no_scheduler")


def test_a_unet_in_training_is_sampled_in_place(random_cascade: RandomCascade) -> None:
    unet = trained_unet(random_cascade.stage_1, AdapterSpec(dropout=0.9))
    cascade = load_cascade(random_cascade.stage_1, parts=Parts(unets={1: unet}))
    assert cascade.stages[1].unet is unet
    evaluated = draw(cascade)
    unet.train()
    assert torch.equal(draw(cascade).low_res, evaluated.low_res)
    assert unet.training
    assert all(module.training for module in unet.modules())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_merged_is_what_was_trained(
    random_cascade: RandomCascade, tmp_path: Path, spec: AdapterSpec
) -> None:
    unets = {}
    for stage, base in ((1, random_cascade.stage_1), (2, random_cascade.stage_2)):
        unets[stage] = trained_unet(base, spec)
        export(unets[stage], tmp_path, base, stage, spec)
    folders = (random_cascade.stage_1, random_cascade.stage_2)
    trained = draw(load_cascade(*folders, parts=Parts(unets=unets)))
    merged = draw(load_cascade(*folders, adapters=[tmp_path]))
    base = draw(load_cascade(*folders))
    for stage in ("stage_1", "stage_2"):
        one, other, plain = (vars(images)[stage][0] for images in (trained, merged, base))
        assert largest_difference(one, other) <= 1
        assert largest_difference(one, plain) > 1


def test_scales_are_linear_and_adapters_add_up(
    cascade: Cascade, random_cascade: RandomCascade, adapter: Path, tmp_path: Path
) -> None:
    spec = AdapterSpec(kind="loha", rank=2)
    base = random_cascade.stage_1
    export(trained_unet(base, spec, seed=1), tmp_path, base, 1, spec)

    def change(*adapters: tuple[Path, float]) -> dict[str, Tensor]:
        before = weights(cascade)
        for folder, scale in adapters:
            cascade.add_adapter(folder, scale)
        after = weights(cascade)
        cascade.remove_adapters()
        return {name: after[name] - before[name] for name in before}

    full, half = change((adapter, 1.0)), change((adapter, 0.5))
    other = change((tmp_path, 2.0))
    both, swapped = change((adapter, 0.5), (tmp_path, 2.0)), change((tmp_path, 2.0), (adapter, 0.5))
    assert any(delta.abs().max() > 1e-3 for delta in full.values())
    for name in full:
        torch.testing.assert_close(half[name], full[name] / 2, rtol=0, atol=1e-6)
        torch.testing.assert_close(both[name], half[name] + other[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(swapped[name], both[name], rtol=0, atol=1e-6)


def test_removal_leaves_the_base_bit_identical(cascade: Cascade, adapter: Path) -> None:
    before = weights(cascade)
    state = torch.get_rng_state()
    cascade.add_adapter(adapter)
    assert torch.equal(torch.get_rng_state(), state)
    cascade.add_adapter(adapter / "stage_2", 0.3)
    assert not equal(weights(cascade), before)
    cascade.remove_adapters()
    assert equal(weights(cascade), before)


def test_in_bfloat16_too(random_cascade: RandomCascade, adapter: Path) -> None:
    cascade = load_cascade(random_cascade.stage_1, dtype="bf16")
    before = weights(cascade)
    cascade.add_adapter(adapter)
    assert draw(cascade).final
    cascade.remove_adapters()
    assert equal(weights(cascade), before)
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}


def test_stages_that_the_cascade_lacks_are_passed_over(
    random_cascade: RandomCascade, adapter: Path
) -> None:
    cascade = load_cascade(random_cascade.stage_1, adapters=[adapter])
    assert [len(merged.adapters) for merged in cascade.merged.values()] == [1]


def test_a_wrong_stage_names_both(random_cascade: RandomCascade, adapter: Path) -> None:
    cascade = load_cascade(random_cascade.stage_1)
    with pytest.raises(UserError, match="adapter of Stage 2, but this cascade has Stage 1"):
        cascade.add_adapter(adapter / "stage_2")


def test_a_wrong_base_names_both_and_merges_nothing(
    random_cascade: RandomCascade, adapter: Path, tmp_path: Path
) -> None:
    other = save_random_cascade(tmp_path, seed=1)
    cascade = load_cascade(random_cascade.stage_1, other.stage_2)
    before = weights(cascade)
    with pytest.raises(UserError) as caught:
        cascade.add_adapter(adapter)
    assert str(random_cascade.stage_2) in str(caught.value)
    assert str(other.stage_2) in str(caught.value)
    assert equal(weights(cascade), before)


def test_a_base_fine_tuned_anywhere_is_another_base(
    random_cascade: RandomCascade, adapter: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(random_cascade.stage_1, subfolder="unet")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name != "conv_in.bias":
                parameter.mul_(1.02)
    cascade = load_cascade(random_cascade.stage_1, parts=Parts(unets={1: unet}))
    with pytest.raises(UserError, match=r"weights differ, for example in mid_block"):
        cascade.add_adapter(adapter)


def test_another_architecture_is_another_base(
    guarded_cascade: RandomCascade, adapter: Path
) -> None:
    cascade = load_cascade(guarded_cascade.stage_1)
    with pytest.raises(UserError, match="sample_size is 32, not 16"):
        cascade.add_adapter(adapter)


def test_a_base_that_has_moved_is_the_same_base(
    random_cascade: RandomCascade, adapter: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    IFPipeline.from_pretrained(random_cascade.stage_1).save_pretrained(moved)
    load_cascade(moved, adapters=[adapter], dtype="bf16")


def test_a_folder_without_adapters(cascade: Cascade, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no exported adapter"):
        cascade.add_adapter(tmp_path)


def test_guards_are_kept_and_run(guarded_cascade: RandomCascade) -> None:
    cascade = load_cascade(
        guarded_cascade.stage_1, guarded_cascade.stage_2, guarded_cascade.stage_3
    )
    pipes = [*cascade.stages.values(), cascade.upscaler]
    for pipe in pipes:
        assert pipe.safety_checker is not None
        assert pipe.watermarker is not None
        torch.nn.init.zeros_(pipe.safety_checker.p_head.weight)
        torch.nn.init.zeros_(pipe.safety_checker.w_head.weight)
        torch.nn.init.constant_(pipe.safety_checker.p_head.bias, -1.0)
        torch.nn.init.constant_(pipe.safety_checker.w_head.bias, -1.0)
    clean = draw(cascade)
    assert clean.flagged == (False,)
    for stage in (clean.stage_1, clean.stage_2, clean.stage_3):
        picture = pixels(stage[0])
        assert picture.min() < 255
        assert (picture == 255).all(axis=2).any(), "the fixture's watermark is white"
    for pipe in pipes:
        torch.nn.init.constant_(pipe.safety_checker.p_head.bias, 1.0)
    flagged = draw(cascade)
    assert flagged.flagged == (True,)
    for stage in (flagged.stage_1, flagged.stage_2, flagged.stage_3):
        corner = pixels(stage[0])[: stage[0].height // 2]
        assert corner.max() == 0


def test_the_guards_weights_are_the_published_ones(guarded_cascade: RandomCascade) -> None:
    from safetensors.torch import load_file

    checker = load_cascade(guarded_cascade.stage_1).stages[1].safety_checker
    saved = load_file(guarded_cascade.stage_1 / "safety_checker" / "model.safetensors")
    state = checker.state_dict()
    assert saved.keys() <= state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())


def test_no_guard_is_lost_with_given_unets(guarded_cascade: RandomCascade) -> None:
    unet = UNet2DConditionModel.from_pretrained(guarded_cascade.stage_1, subfolder="unet")
    pipe = load_cascade(guarded_cascade.stage_1, parts=Parts(unets={1: unet})).stages[1]
    assert pipe.safety_checker is not None
    assert pipe.watermarker is not None


def test_threads_draw_what_each_draws_alone(random_cascade: RandomCascade) -> None:
    cascade = load_cascade(random_cascade.stage_1, random_cascade.stage_2)
    prompts = ["a cat", "a red dog", "two cars on a road", "a cat"]

    def drawn(prompt: str) -> bytes:
        few = Sampling(stage_1=StageSampling(steps=2), stage_2=StageSampling(steps=2))
        return cascade(prompt, sampling=few, progress=False)[0].final.tobytes()

    expected = [drawn(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(drawn, prompts)) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "fp99"}, "Stage 1: unknown dtype 'fp99'; did you mean fp32"),
        ({"dtype": torch.float16}, "unknown dtype torch.float16"),
        ({"parts": Parts(originals="disk")}, r"originals must be device or cpu \(got 'disk'\)"),
        ({"parts": Parts(unets={2: None})}, "unets has one for Stage 2, but stage_2 is not given"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
    ],
)
def test_what_cannot_be_loaded(
    random_cascade: RandomCascade, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load_cascade(random_cascade.stage_1, **({"device": "cpu"} | options))


@pytest.mark.parametrize("kind", [str, Path])
def test_one_adapter_is_given_as_it_is(
    random_cascade: RandomCascade, adapter: Path, kind: type
) -> None:
    cascade = load_cascade(random_cascade.stage_1, adapters=kind(adapter), device="cpu")
    assert list(cascade.sources.values()) == [str(adapter)]
    with pytest.raises(UserError, match=r"given as a folder or a hub name \(got 3\)"):
        load_cascade(random_cascade.stage_1, adapters=3, device="cpu")


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", None, "model_index.json must be a JSON object .got a list"),
        ("model_index.json", {"unet": 3}, "cannot be loaded"),
        ("model_index.json", {"safety_checker": 3}, "cannot be loaded"),
        ("unet/config.json", None, "unet/config.json must be a JSON object .got a list"),
        ("unet/config.json", {"block_out_channels": 3}, "cannot be loaded"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": "many"},
            "num_train_timesteps in its scheduler/.* must be a whole number .got 'many'",
        ),
        (
            "scheduler/scheduler_config.json",
            {"dynamic_thresholding_ratio": [1]},
            r"dynamic_thresholding_ratio in its scheduler/.* must be a number .got \[1\]",
        ),
    ],
)
def test_a_damaged_configuration_is_said(
    random_cascade: RandomCascade,
    tmp_path: Path,
    file: str,
    changes: dict[str, Any] | None,
    sentence: str,
) -> None:
    base = tmp_path / "base"
    copytree(random_cascade.stage_1, base)
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps([1] if changes is None else content | changes))
    with pytest.raises(UserError, match=sentence):
        load_cascade(base, device="cpu", parts=Parts(text_encoder=False))
    if file == "unet/config.json":
        with pytest.raises(UserError, match=r"cannot be loaded"):
            _ = StoredUNet.find(str(base / "unet")).weights


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        (None, {}, r"A prompt must be a string \(got None\)"),
        (["a cat", 3], {}, r"A prompt must be a string \(got 3\)"),
        ("a \udcff", {}, "byte that is not UTF-8"),
        ("a cat", {"negative_prompt": "\udcff"}, "byte that is not UTF-8"),
        ("a cat", {"sampling": {}}, r"sampling must be a Sampling\(...\) \(got {}\)"),
        ("a cat", {"seed": -1}, r"A seed must be a whole number from 0 .* \(got -1\)"),
        ("a cat", {"seed": "1"}, r"A seed must be a whole number from 0 .* \(got '1'\)"),
        ("a cat", {"seed": 2**64}, rf"\(got {2**64}\)"),
        ("a cat", {"seed": 2**64 - 1, "images_per_prompt": 2}, rf"\(got {2**64}\)"),
        ("a cat", {"images_per_prompt": 1.5}, r"a whole number from 1 \(got 1.5\)"),
        ("a cat", {"seed": [1, 2]}, r"one for each of the 1 pictures \(got 2\)"),
        ("a cat", {"negative_prompt": ["b", "c"]}, r"one for each of the 1 \(got 2\)"),
    ],
)
def test_what_cannot_be_drawn(
    cascade: Cascade, prompt: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        cascade(prompt, **({"sampling": FEW_STEPS, "progress": False} | options))


def test_every_seed_of_a_generator_draws(cascade: Cascade) -> None:
    seeds = np.array([0, 2**64 - 1], np.uint64)
    images = cascade([PROMPT] * 2, seed=seeds, sampling=FEW_STEPS, progress=False)
    assert images.seeds == (0, 2**64 - 1)
    assert not torch.equal(*images.low_res)


@pytest.mark.parametrize(
    ("low_res", "sentence"),
    [
        (np.zeros((1, 3, 16, 16)), r"must be a PIL image or a file \(got a ndarray\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"\(got torch.uint8 \[1, 3, 16, 16\]\)"),
        (
            torch.zeros(1, 1, 16, 16),
            r"\[pictures, 3, 16, 16\] \(got torch.float32 \[1, 1, 16, 16\]\)",
        ),
        (
            torch.zeros(1, 3, 32, 32),
            r"\[pictures, 3, 16, 16\] \(got torch.float32 \[1, 3, 32, 32\]\)",
        ),
        (torch.zeros(3, 16, 16), r"\[pictures, 3, 16, 16\] \(got torch.float32 \[3, 16, 16\]\)"),
        (torch.zeros(1, 3, 16, 24), r"must be square \(got torch.float32 \[1, 3, 16, 24\]\)"),
        (torch.zeros(1, 3, 0, 16), r"\(got torch.float32 \[1, 3, 0, 16\]\)"),
        (torch.full((1, 3, 16, 16), 255.0), r"low_res must be in \[-1, 1\] \(got 255 to 255\)"),
        (torch.full((1, 3, 16, 16), float("nan")), r"low_res must be in \[-1, 1\] \(got nan"),
    ],
)
def test_what_cannot_be_enlarged(cascade: Cascade, low_res: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        cascade(PROMPT, low_res=low_res, sampling=FEW_STEPS)


def test_parameters_of_earlier_versions_name_the_new_ones(
    random_cascade: RandomCascade, cascade: Cascade
) -> None:
    for name, value in {"scale": 0.5, "text_encoder": False, "originals": "cpu"}.items():
        with pytest.raises(UserError, match=rf"takes no {name}: give .*{name}"):
            load_cascade(random_cascade.stage_1, **{name: value})
    with pytest.raises(TypeError, match="'textencoder'"):
        load_cascade(random_cascade.stage_1, textencoder=False)
    with pytest.raises(AttributeError, match=r"cascade\(prompts, embeds="):
        _ = cascade.sample
    with pytest.raises(UserError, match=r"noise_level is now stage_2: .*\(stage_2\.noise_level\)"):
        Sampling(noise_level=3)
