"""Random-weight models of the published sizes, in the published layout, for measurements.

    python -m benchmarks.random_model FOLDER --unet IF-I-XL

The sizes are those of :mod:`adapters.base.published`. The text encoder has T5-XXL's width but a
single layer, since measurements of training read cached encodings; ``--t5-xxl`` makes all layers.
Its tokenizer is the embedded cascade's. ``--guarded`` adds the watermarker and a safety checker of
the published size, which flags no picture.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
)

from adapters.base.published import CLIP_VISION, T5_XXL, read_unets
from adapters.base.source import GUARDS
from benchmarks.machine import ROOT, SIZES
from tests.builders.random_cascade import clip_tokenizer, scheduler

UNETS = read_unets()


@contextmanager
def random_weights(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Give models built in a block the same random weights each time, on a device, in a dtype."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a float32 copy of T5-XXL would not fit everywhere
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def random_guards(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Build a safety checker with random weights, its preprocessor, and the watermarker."""
    with torch.device(device):
        checker = IFSafetyChecker(CLIPConfig(vision_config=dict(CLIP_VISION)))
        for head in (checker.p_head, checker.w_head):
            torch.nn.init.constant_(head.bias, -1e4)  # below the threshold for any picture
    watermarker = IFWatermarker()
    watermarker.watermark_image.fill_(255)
    return {
        "safety_checker": checker.to(device, dtype),
        "feature_extractor": CLIPImageProcessor(),
        "watermarker": watermarker,
    }


def save_random_model(
    folder: Path,
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    t5_xxl: bool = False,
    guarded: bool = False,
) -> None:
    """Write one stage as a folder that its pipeline's ``from_pretrained`` loads."""
    config = UNETS[name]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/if-tiny/stage_1/tokenizer")
    small = {"vocab_size": len(tokenizer), "d_ff": 64, "num_heads": 1, "num_layers": 1}
    text = T5Config(
        d_model=config["encoder_hid_dim"],
        d_kv=64,
        feed_forward_proj="gated-gelu",
        **(T5_XXL if t5_xxl else small),
    )
    with random_weights(device, dtype):
        text_encoder = T5EncoderModel(text)
    with random_weights(device, dtype):
        unet = UNet2DConditionModel(**config, encoder_hid_dim_type="text_proj")
    shared = {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "unet": unet.to(device, dtype),
        **(random_guards(device, dtype) if guarded else dict.fromkeys(GUARDS)),
        "requires_safety_checker": guarded,
    }
    if "class_embed_type" in config:
        noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        pipeline = IFSuperResolutionPipeline(
            **shared, scheduler=scheduler(1.0), image_noising_scheduler=noising
        )
    else:
        pipeline = IFPipeline(**shared, scheduler=scheduler(1.5))
    pipeline.save_pretrained(folder)


def save_random_upscaler(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write an x4 upscaler of the published size as a folder that its pipeline loads."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            scaling_factor=0.08333,
        )
        unet = UNet2DConditionModel(
            in_channels=7,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(256, 512, 512, 1024),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            cross_attention_dim=1024,
            attention_head_dim=8,
            num_class_embeds=1000,
            only_cross_attention=(True, True, True, False),
            use_linear_projection=True,
        )
        text_encoder = CLIPTextModel(text)
    StableDiffusionUpscalePipeline(
        vae=vae.to(dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=tokenizer,
        unet=unet.to(dtype),
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False
        ),
    ).save_pretrained(folder)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    sizes = [SIZES[3], *(name for name in UNETS if name[0] != "_")]
    parser.add_argument("--unet", required=True, choices=sizes)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--t5-xxl", action="store_true", help="with the whole text encoder")
    parser.add_argument("--guarded", action="store_true", help="with safety checker and watermark")
    options = parser.parse_args()
    if options.unet == SIZES[3]:
        save_random_upscaler(options.folder, device=options.device)
        return
    save_random_model(
        options.folder,
        options.unet,
        device=options.device,
        t5_xxl=options.t5_xxl,
        guarded=options.guarded,
    )


if __name__ == "__main__":
    main()
