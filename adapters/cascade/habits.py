"""Names that diffusers has for what is called otherwise here."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

from adapters.errors import UserError, hint

ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "num_inference_steps": "give sampling=Sampling(stage_1=StageSampling(steps=…))",
        "guidance_scale": "give sampling=Sampling(stage_1=StageSampling(guidance=…))",
        "timesteps": 'give sampling=Sampling(stage_1=StageSampling(timesteps="smart50"))',
        "noise_level": "give sampling=Sampling(stage_2=StageSampling(noise_level=…))",
        "generator": "give seed=, one for all pictures or one for each",
        "num_images_per_prompt": "give images_per_prompt=",
        "image": "call cascade.img2img(picture, prompt), or give low_res= to enlarge it",
        "mask_image": "call cascade.inpaint(picture, mask, prompt)",
        "strength": "call cascade.img2img(picture, prompt, strength=…)",
        "prompt_embeds": "give embeds=, by prompt",
        "negative_prompt_embeds": "give embeds=, by prompt",
        "cross_attention_kwargs": "call cascade.set_adapters({name: scale}) before",
        **dict.fromkeys(("height", "width"), "leave it out: each stage's base sets the size"),
        **dict.fromkeys(
            ("output_type", "return_dict"), "leave it out: cascade(…)[0].final is a PIL picture"
        ),
    }
)
"""The advice in place of each argument of diffusers' pipelines to a cascade."""

ATTRIBUTES: Mapping[str, str] = MappingProxyType(
    {
        "to": 'load it there with load_cascade(…, device="cuda")',
        "cuda": 'load it there with load_cascade(…, device="cuda")',
        "load_lora_weights": "call cascade.add_adapter(folder)",
        "load_adapter": "call cascade.add_adapter(folder)",
        "unload_lora_weights": "call cascade.remove_adapters()",
        "delete_adapters": "call cascade.remove_adapter(name)",
        "disable_lora": "call cascade.set_adapters({})",
        "get_active_adapters": "see cascade.adapters",
        "get_list_adapters": "see cascade.adapters",
        **dict.fromkeys(("fuse_lora", "unfuse_lora"), "leave it out: adapters are always merged"),
        **dict.fromkeys(
            (
                "enable_model_cpu_offload",
                "enable_sequential_cpu_offload",
                "enable_attention_slicing",
                "enable_xformers_memory_efficient_attention",
            ),
            'load it with load_cascade(…, memory="6GB")',
        ),
        "from_pretrained": "call load_cascade",
        "unet": "see cascade.stages[1].unet",
        "scheduler": "see cascade.stages[1].scheduler",
        "encode_prompt": "call cascade.encode(prompts)",
        "sample": "call cascade(prompts, embeds={prompt: encoding}, seed=[…])",
    }
)
"""The advice in place of each attribute of diffusers' pipelines, or of version 0.1, of a
cascade."""

LOADING: Mapping[str, str] = MappingProxyType(
    {
        "torch_dtype": 'give dtype="bf16"',
        "lora": "give adapters=",
        **dict.fromkeys(("safety_checker", "watermarker"), "leave it out: the base's guards stay"),
        "text_encoder": "give parts=Parts(text_encoder=…)",
    }
)
"""The advice in place of each argument of ``from_pretrained`` to ``load_cascade``."""


def check_arguments(
    given: Mapping[str, object], habits: Mapping[str, str], valid: Collection[str], what: str
) -> None:
    """Refuse arguments that a function does not have.

    Args:
        given: the unknown arguments.
        habits: what to do instead, by name.
        valid: the arguments that there are.
        what: the function, for the message.

    Raises:
        UserError: with what to do instead.
        TypeError: if that is not known.
    """
    for name in given:
        if name in habits:
            raise UserError(f"{what} takes no {name}: {habits[name]}.")
        close = hint(name, list(valid))
        raise TypeError(
            f"{what} got an unexpected keyword argument {name!r}" + (f"; {close}" if close else "")
        )
