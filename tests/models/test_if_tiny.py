"""The embedded cascade: IF's own layout in miniature, small, and it draws what it is told."""

import ast
import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, IFPipeline, IFSuperResolutionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from adapters.base.estimates import PROMPT_TOKENS
from adapters.base.source import Source
from finetune.evaluation.metrics import ClipScorer
from models.architecture import make_scheduler
from models.world import BACKGROUNDS, SEEN, THINGS, caption
from tests.builders import ROOT

TINY = ROOT / "models" / "if-tiny"
MAX_BYTES = 24_000_000

NAMES = ("banana", "frog face", "car", "snowman")
"""What to draw; the cascade was shown all of them."""
COUNT = len(NAMES)
CANDIDATES = 20
BACKGROUND = BACKGROUNDS.index(("blue", "plain"))

IF_SIZES = {32, 64, 77, 128, 256, 1024, 4096}
"""Picture sizes, text lengths and widths, which come from a model's configuration."""


ALLOWED = {
    ("estimates", PROMPT_TOKENS),  # held equal to diffusers' own
    ("redraw", 128),  # a grey level
    ("text_files", 64),  # MiB
    ("reading", 1024),  # bytes of a KiB
    ("stopping", 128),  # the exit status of a shell's command that a signal ended is 128 and more
}
"""Numbers that are none of these sizes, by module."""

OF_MODELS = ("published", "configurations")
"""Modules made of such sizes: the published ones, and libraries' defaults and bounds of others."""


def config(*parts: str) -> dict[str, object]:
    content: dict[str, object] = json.loads(TINY.joinpath(*parts).read_text())
    return content


@pytest.fixture(scope="module")
def stages() -> tuple[IFPipeline, IFSuperResolutionPipeline]:
    loaded = (
        IFPipeline.from_pretrained(TINY / "stage_1"),
        IFSuperResolutionPipeline.from_pretrained(TINY / "stage_2"),
    )
    for stage in loaded:
        stage.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Captions of other objects on the same background; those to draw come first."""
    seen = [index for index in SEEN if THINGS[index].name in NAMES]
    others = [index for index in SEEN[::11] if index not in seen]
    return [caption(index, BACKGROUND) for index in seen + others]


@pytest.fixture(scope="module")
def drawn(
    stages: tuple[IFPipeline, IFSuperResolutionPipeline], prompts: list[str]
) -> dict[str, Tensor]:
    """Pictures of the first captions, [N, 3, s, s] in [-1, 1], by stage."""
    embeds, negative = stages[0].encode_prompt(prompts[:COUNT])
    draw = torch.Generator().manual_seed(0)
    text = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "generator": draw}
    text["output_type"] = "pt"
    small = stages[0](**text, num_inference_steps=15, guidance_scale=3.0).images
    large = stages[1](
        **text, image=small, num_inference_steps=6, guidance_scale=1.0, noise_level=100
    ).images
    return {"stage_1": small, "stage_2": large}


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) <= MAX_BYTES


def test_it_loads_in_full_precision(
    stages: tuple[IFPipeline, IFSuperResolutionPipeline],
) -> None:
    for stage in stages:
        for model in (stage.unet, stage.text_encoder):
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_both_stages_read_the_same_text() -> None:
    for part in ("text_encoder", "tokenizer"):
        files = sorted(file.name for file in (TINY / "stage_1" / part).iterdir())
        assert files == sorted(file.name for file in (TINY / "stage_2" / part).iterdir())
        for name in files:
            one, other = (TINY / stage / part / name for stage in ("stage_1", "stage_2"))
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_the_schedule_is_ifs(stage: str) -> None:
    scheduler = config(stage, "scheduler", "scheduler_config.json")
    assert scheduler["_class_name"] == "DDPMScheduler"
    assert scheduler["beta_schedule"] == "squaredcos_cap_v2"
    assert scheduler["variance_type"] == "learned_range"
    assert scheduler["prediction_type"] == "epsilon"
    assert scheduler["thresholding"] is True
    assert scheduler["lambda_min_clipped"] == -5.1
    made = dict(make_scheduler(stage).config)
    assert {name: made[name] for name in scheduler if name[0] != "_"} == {
        name: value for name, value in scheduler.items() if name[0] != "_"
    }


@pytest.mark.parametrize("number", [1, 2])
def test_what_the_schedule_has_for_dpm_solvers_reaches_them_without_a_warning(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    diffusers_logging.enable_propagation()
    try:
        source = Source(str(TINY / f"stage_{number}"), number)
        alone = source.scheduler("scheduler")
        within = source.pipeline(torch.float32, text_encoder=None, tokenizer=None).scheduler
    finally:
        diffusers_logging.disable_propagation()
    assert "lambda" not in caplog.text
    assert alone.config == within.config
    assert alone.config.lambda_min_clipped == -5.1
    clipped, unclipped = (
        DPMSolverMultistepScheduler.from_config(alone.config, timestep_spacing="linspace", **fields)
        for fields in ({}, {"lambda_min_clipped": -float("inf")})
    )
    assert clipped.config.lambda_min_clipped == -5.1
    for solver in (clipped, unclipped):
        solver.set_timesteps(20)
    log_snr = (solver.alphas_cumprod / (1 - solver.alphas_cumprod)).log() / 2
    assert log_snr[clipped.timesteps].min() >= -5.1 > log_snr[unclipped.timesteps].min()


@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_the_unet_is_built_of_ifs_blocks(stage: str) -> None:
    unet = config(stage, "unet", "config.json")
    assert unet["mid_block_type"] == "UNetMidBlock2DSimpleCrossAttn"
    for field, attending, plain in (
        ("down_block_types", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        ("up_block_types", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ):
        assert set(unet[field]) == {attending, plain}
    assert unet["encoder_hid_dim_type"] == "text_proj"
    assert unet["addition_embed_type"] == "text"
    assert unet["class_embed_type"] == {"stage_1": None, "stage_2": "timestep"}[stage]
    channels = {"stage_1": 3, "stage_2": 6}
    assert (unet["in_channels"], unet["out_channels"]) == (channels[stage], 6)


def test_sizes_and_text_lengths_are_as_ifs(
    stages: tuple[IFPipeline, IFSuperResolutionPipeline],
) -> None:
    small, large = (stage.unet.config.sample_size for stage in stages)
    assert large == 4 * small
    embeds, negative = stages[0].encode_prompt("a banana")
    assert embeds.shape == negative.shape == (1, 77, stages[0].text_encoder.config.d_model)


def test_every_picture_has_its_stages_size(
    stages: tuple[IFPipeline, IFSuperResolutionPipeline], drawn: dict[str, Tensor]
) -> None:
    for stage, pixels in zip(stages, drawn.values(), strict=True):
        side = stage.unet.config.sample_size
        assert pixels.shape == (COUNT, 3, side, side)
        assert pixels.isfinite().all()


@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_it_draws_what_it_is_told(stage: str, drawn: dict[str, Tensor], prompts: list[str]) -> None:
    assert len(prompts) >= CANDIDATES
    arrays = VaeImageProcessor.pt_to_numpy(drawn[stage] / 2 + 0.5).clip(0, 1)
    pictures: list[Image.Image] = VaeImageProcessor.numpy_to_pil(arrays)
    scorer = ClipScorer(str(TINY / "clip"))
    first = (scorer.images(pictures) @ scorer.texts(prompts).T).argmax(dim=1)
    assert (first == torch.arange(COUNT)).sum() >= COUNT - 1


@pytest.mark.parametrize("package", ["finetune", "adapters"])
def test_no_size_of_a_model_is_written_into_the_code(package: str) -> None:
    literals = [
        f"{file}:{node.lineno}: {node.value}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in IF_SIZES
        if (file.stem, node.value) not in ALLOWED and file.stem not in OF_MODELS
    ]
    assert literals == []
