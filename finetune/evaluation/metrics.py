"""CLIP-I, likeness to the subject, and CLIP-T, likeness to the prompt.

Both are measured as in DreamBooth (arXiv 2208.12242, section 4.2).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from adapters.errors import UserError


class ClipScorer:
    """A CLIP model that maps pictures and texts to unit vectors in its joint space."""

    def __init__(self, clip: str, device: torch.device | str = "cpu") -> None:
        """Load a CLIP model from a folder or hub name.

        Raises:
            UserError: if there is no such model, or it has no safetensors weights.
        """
        try:
            self.model = CLIPModel.from_pretrained(clip, use_safetensors=True).eval().to(device)
            self.processor = AutoProcessor.from_pretrained(clip)
        except (OSError, ValueError) as error:
            raise UserError(
                "evaluation.clip must name a CLIP model with safetensors weights, as a folder or on"
                f" the hub (got {clip!r}): {error}"
            ) from error

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Compute the unit vectors of pictures, [N, E]."""
        inputs = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        return self._unit(self.model.get_image_features, inputs)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Compute the unit vectors of texts, [N, E]."""
        inputs = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True
        )
        return self._unit(self.model.get_text_features, inputs)

    @torch.inference_mode()
    def _unit(self, features: Any, inputs: Any) -> Tensor:
        pooled: Tensor = features(**inputs.to(self.model.device)).pooler_output
        return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu()


def clip_i(generated: Tensor, real: Tensor) -> float:
    """Average the cosines of all generated and real pictures: subject fidelity, at most 1."""
    return float((generated @ real.T).mean())


def clip_i_ceiling(real: Tensor) -> float | None:
    """Average the cosines of all pairs of different real pictures: the most CLIP-I can reach.

    Returns ``None`` if there is only one picture.
    """
    count = len(real)
    if count == 1:
        return None
    return float(((real @ real.T).sum() - count) / (count * (count - 1)))


def clip_t(generated: Tensor, texts: Tensor) -> float:
    """Average the cosine of each picture and its own prompt: prompt fidelity."""
    return float((generated * texts).sum(-1).mean())
