"""CLIP-I, likeness to the subject, and CLIP-T, likeness to the prompt.

As DreamBooth measures them (arXiv 2208.12242, section 4.2).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from adapters.errors import UserError


class ClipScorer:
    """A CLIP model, in whose joint space pictures and texts are compared."""

    def __init__(self, clip: str, device: torch.device | str = "cpu") -> None:
        """Load a CLIP model from a folder or hub name.

        Raises:
            UserError: if there is none, or none in safetensors.
        """
        try:
            self.model = CLIPModel.from_pretrained(clip, use_safetensors=True).eval().to(device)
            self.processor = AutoProcessor.from_pretrained(clip)
        except (OSError, ValueError) as error:
            raise UserError(
                "comparison.clip must name a CLIP model with safetensors weights, as a folder or on"
                f" the hub (got {clip!r}): {error}"
            ) from error

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors of pictures, [N, E]."""
        inputs = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        return self._unit(self.model.get_image_features, inputs)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, [N, E]."""
        inputs = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True
        )
        return self._unit(self.model.get_text_features, inputs)

    @torch.inference_mode()
    def _unit(self, features: Any, inputs: Any) -> Tensor:
        pooled: Tensor = features(**inputs.to(self.model.device)).pooler_output
        return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu()


def clip_i(generated: Tensor, real: Tensor) -> float:
    """Mean pairwise cosine of generated to real pictures: subject fidelity, at most 1."""
    return float((generated @ real.T).mean())


def clip_i_ceiling(real: Tensor) -> float | None:
    """Mean pairwise cosine of different real pictures of the subject: the most CLIP-I can reach.

    ``None`` if there is only one picture.
    """
    count = len(real)
    if count == 1:
        return None
    return float(((real @ real.T).sum() - count) / (count * (count - 1)))


def clip_t(generated: Tensor, texts: Tensor) -> float:
    """Mean cosine of each picture to its own prompt: prompt fidelity."""
    return float((generated * texts).sum(-1).mean())
