"""Tiny random-weight IF cascades in the published folder layout, for tests.

The architecture is IF's own, block for block; only the numbers are small. Such a cascade draws
noise, but through the same code as the published models.
"""

import string
from dataclasses import dataclass
from pathlib import Path

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
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_WIDTH = 32
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}
UNET = {
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": TEXT_WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
}
SUPER_RESOLUTION = {
    "class_embed_type": "timestep",
    "only_cross_attention": True,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 2**0.5,
    "mid_block_scale_factor": 2**0.5,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 64,
}


@dataclass(frozen=True)
class RandomCascade:
    """The folders of a random cascade."""

    stage_1: Path
    stage_2: Path
    stage_3: Path

    def stage(self, number: int) -> Path:
        """The folder of a stage."""
        return (self.stage_1, self.stage_2, self.stage_3)[number - 1]


def save_random_cascade(
    folder: Path, *, guarded: bool = False, seed: int = 0, width: int = 16
) -> RandomCascade:
    """Save a random cascade: 16 px, 64 px and the x4 upscaler.

    Args:
        folder: receives ``stage_1``, ``stage_2`` and ``stage_3``.
        guarded: with IF's safety checker (random too) and its watermarker. Stage I then has 32 px,
            since the watermark would be less than a pixel wide on 16.
        seed: the seed of all weights; the global generator is left as it was.
        width: the UNets' channels at full size; twice as many are below.
    """
    cascade = RandomCascade(folder / "stage_1", folder / "stage_2", folder / "stage_3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shared = {"tokenizer": t5_tokenizer(), "text_encoder": t5_encoder()}
        IFPipeline(
            **shared,
            **_guards(guarded),
            unet=unet(sample_size=32 if guarded else 16, width=width),
            scheduler=scheduler(sample_max_value=1.5),
        ).save_pretrained(cascade.stage_1)
        IFSuperResolutionPipeline(
            **shared,
            **_guards(guarded),
            unet=unet(sample_size=64, super_resolution=True, width=width),
            scheduler=scheduler(sample_max_value=1.0),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        ).save_pretrained(cascade.stage_2)
        upscaler().save_pretrained(cascade.stage_3)
    return cascade


def scheduler(sample_max_value: float) -> DDPMScheduler:
    """IF's noise schedule, with the published field that only DPM-Solvers read."""
    own = {"sample_max_value": sample_max_value, "lambda_min_clipped": -5.1}
    return DDPMScheduler.from_config(SCHEDULER | own)


def unet(sample_size: int, super_resolution: bool = False, width: int = 16) -> UNet2DConditionModel:
    """A UNet with IF's block types; weights from the global generator."""
    extra = SUPER_RESOLUTION if super_resolution else {}
    channels = {
        "in_channels": 6 if super_resolution else 3,
        "out_channels": 6,
        "block_out_channels": (width, 2 * width),
        "cross_attention_dim": 2 * width,
    }
    return UNet2DConditionModel(sample_size=sample_size, **channels, **UNET, **extra).eval()


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer of single characters and a few words."""
    words = ["▁a", "▁photo", "▁of", "▁sks", "▁cat", "▁dog", "▁on", "▁blue", "▁background"]
    scores = dict.fromkeys(words, -1.0)
    scores |= dict.fromkeys("▁" + string.ascii_lowercase + string.digits + ",.'-&<>/", -3.0)
    special = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    vocab = [*special.items(), *scores.items()]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=77)


def t5_encoder() -> T5EncoderModel:
    """A T5 v1.1 encoder of one layer; weights from the global generator."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def upscaler() -> StableDiffusionUpscalePipeline:
    """A x4 upscaler: latent diffusion, 4 + 3 channels in, with a CLIP text encoder."""
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return StableDiffusionUpscalePipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.08333,
        ),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            in_channels=7,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
            num_class_embeds=1000,
            only_cross_attention=(False, True),
        ).eval(),
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False
        ),
    )


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token for each character."""
    letters = [*string.ascii_lowercase, *string.digits, ",", ".", "'", "-"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate([*tokens, *special])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _guards(guarded: bool) -> dict[str, object]:
    """The components that guard a pipeline, or ``None`` for each."""
    if not guarded:
        names = ("safety_checker", "feature_extractor", "watermarker")
        return {**dict.fromkeys(names), "requires_safety_checker": False}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "projection_dim": 16,
    }
    watermarker = IFWatermarker()
    watermarker.watermark_image.fill_(255)
    return {
        "safety_checker": IFSafetyChecker(CLIPConfig(vision_config=vision)).eval(),
        "feature_extractor": CLIPImageProcessor(size=32, crop_size=32),
        "watermarker": watermarker,
    }
