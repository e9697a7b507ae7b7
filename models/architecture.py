"""The networks of the embedded cascade, and their folders.

They have IF's own block types, with fewer and narrower layers; compare
`models/if-tiny/*/unet/config.json` with a published one.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.text import MAX_TOKENS, make_tokenizer

TEXT_WIDTH = 128
CLIP_PX = 64
STAGE_1_PX, STAGE_2_PX = 32, 128

UNET_COMMON = {
    "out_channels": 6,
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": TEXT_WIDTH,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
}
DOWN, ATTENTION_DOWN = "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"
UP, ATTENTION_UP = "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"
UNETS: Mapping[str, dict[str, object]] = {
    "stage_1": {
        "sample_size": STAGE_1_PX,
        "in_channels": 3,
        "block_out_channels": (64, 96, 128),
        "layers_per_block": 2,
        "norm_num_groups": 16,
        "cross_attention_dim": 128,
        "time_embedding_dim": 192,
        "down_block_types": (DOWN, ATTENTION_DOWN, ATTENTION_DOWN),
        "up_block_types": (ATTENTION_UP, ATTENTION_UP, UP),
    },
    "stage_2": {
        "sample_size": STAGE_2_PX,
        "in_channels": 6,
        "block_out_channels": (32, 48, 64, 96),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 96,
        "time_embedding_dim": 128,
        "time_embedding_act_fn": "gelu",
        "class_embed_type": "timestep",
        "only_cross_attention": True,
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1.4142271248762552,
        "mid_block_scale_factor": 1.4142271248762552,
        "down_block_types": (DOWN, DOWN, ATTENTION_DOWN, ATTENTION_DOWN),
        "up_block_types": (ATTENTION_UP, ATTENTION_UP, UP, UP),
    },
}
SAMPLE_MAX_VALUES = {"stage_1": 1.5, "stage_2": 1.0}


def make_unet(stage: str) -> UNet2DConditionModel:
    """Build the UNet of "stage_1" or "stage_2", with random weights."""
    return UNet2DConditionModel(**UNET_COMMON, **UNETS[stage])


def make_scheduler(stage: str) -> DDPMScheduler:
    """Build IF's noise schedule and sampler for a stage."""
    return DDPMScheduler.from_config(
        {
            "num_train_timesteps": 1000,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "epsilon",
            "variance_type": "learned_range",
            "clip_sample": True,
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.95,
            "sample_max_value": SAMPLE_MAX_VALUES[stage],
            # DDPM ignores it; a DPM-Solver built from this configuration needs it, as it cannot
            # start where the cosine schedule's log signal-to-noise ratio is unbounded
            "lambda_min_clipped": -5.1,
        }
    )


def make_noising_scheduler() -> DDPMScheduler:
    """Build the schedule of the noise on Stage II's low-res pictures."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def make_text_encoder() -> T5EncoderModel:
    """Build a T5 v1.1 encoder, three layers of width 128, with random weights."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(make_tokenizer()),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def make_clip() -> CLIPModel:
    """Build a CLIP of two narrow transformers, with random weights."""
    shared = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    text = CLIPTextConfig(
        vocab_size=len(make_tokenizer()),
        max_position_embeddings=MAX_TOKENS,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **shared,
    )
    vision = CLIPVisionConfig(image_size=CLIP_PX, patch_size=8, num_hidden_layers=5, **shared)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    )


def make_clip_processor() -> CLIPProcessor:
    """Build the processor of `make_clip`; its image half needs only Pillow."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_PX},
        crop_size={"height": CLIP_PX, "width": CLIP_PX},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(images, make_tokenizer())


def save_stage(
    folder: Path, stage: str, unet: UNet2DConditionModel, text_encoder: T5EncoderModel
) -> None:
    """Write a stage in the published layout."""
    parts = {
        "tokenizer": make_tokenizer(),
        "text_encoder": text_encoder,
        "unet": unet,
        "scheduler": make_scheduler(stage),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    if stage == "stage_1":
        pipeline = IFPipeline(**parts)
    else:
        pipeline = IFSuperResolutionPipeline(
            **parts, image_noising_scheduler=make_noising_scheduler()
        )
    pipeline.to(torch.float16).save_pretrained(folder)  # half the size in the repository
    compute_in_float32(folder / "text_encoder")


def save_clip(folder: Path, clip: CLIPModel) -> None:
    """Write the CLIP and its processor."""
    clip.half().save_pretrained(folder)
    make_clip_processor().save_pretrained(folder)
    compute_in_float32(folder)


def compute_in_float32(folder: Path) -> None:
    """Make a transformers model load in float32, although it is stored in half precision."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
