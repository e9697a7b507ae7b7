"""How many tokens IF's pipelines make of a prompt."""

import torch
from diffusers import IFPipeline
from torch import Tensor


class _Measuring:
    """A tokenizer and text encoder that only notes how many tokens are asked for."""

    dtype = torch.float32
    tokens = 1

    def __call__(self, text: object, max_length: int = 1, **_: object) -> "_Measuring":
        self.tokens = max(self.tokens, max_length)
        return self

    @property
    def input_ids(self) -> Tensor:
        return torch.zeros(1, self.tokens)

    attention_mask = input_ids

    def __getitem__(self, index: int) -> Tensor:
        return self.input_ids[..., None]


def prompt_tokens() -> int:
    """How many tokens IF's pipelines pad a prompt to, as their own code asks for."""
    pipeline = IFPipeline(*[None] * 7, requires_safety_checker=False)
    pipeline.tokenizer = pipeline.text_encoder = measuring = _Measuring()
    pipeline.encode_prompt("", do_classifier_free_guidance=False, device=torch.device("cpu"))
    return measuring.tokens
