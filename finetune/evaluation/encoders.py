"""Models that map pictures, and texts, to unit vectors, whose cosines are the scores.

Shapes: N pictures or texts, E the width of a model's space.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPModel

# the one that transformers exports refuses to work without torchvision, but does not need it
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from adapters.errors import UserError

BATCH_SIZE = 25
"""The number of pictures encoded at once."""

AS_TENSORS = MappingProxyType({"weights_only": True, "dtype": torch.float32})
"""The settings that weights are loaded with: from files that are older than safetensors, PyTorch's
reader builds nothing but tensors, and refuses the rest."""


class PictureEncoder(Protocol):
    """A model that maps pictures to unit vectors."""

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Compute the unit vectors of pictures, [N, E]."""


class ClipScorer:
    """A CLIP model that maps pictures and texts to unit vectors in its joint space."""

    def __init__(self, clip: str, device: torch.device | str = "cpu") -> None:
        """Load a CLIP model from a folder or hub name.

        Raises:
            UserError: if there is no such model, or its weights hold more than tensors.
        """
        load = partial(_load, "clip", "a CLIP model", clip)
        self.model = load(CLIPModel.from_pretrained, **AS_TENSORS).eval().to(device)
        self.processor = load(AutoProcessor.from_pretrained)

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


class DinoScorer:
    """A DINO model (arXiv 2104.14294) or DINOv2 (2304.07193), by the CLS token of its last layer.

    Attributes:
        OPTIONS: the settings that each type of model is loaded with. A ViT leaves out its pooling
            layer, for which DINO's files have no weights.
    """

    OPTIONS = MappingProxyType(
        {
            "vit": {"add_pooling_layer": False},
            "dinov2": {},
            "dinov2_with_registers": {},
        }
    )

    def __init__(self, dino: str, device: torch.device | str = "cpu") -> None:
        """Load a model from a folder or hub name.

        Raises:
            UserError: if there is no such model, it is of another type, or its weights hold more
                than tensors.
        """
        load = partial(_load, "dino", "a DINO or DINOv2 model", dino)
        kind = load(AutoConfig.from_pretrained).model_type
        if kind not in self.OPTIONS:
            raise UserError(
                "evaluation.dino must name a DINO or DINOv2 model, such as facebook/dino-vits16,"
                f" but {dino!r} is of the type {kind!r}; name another."
            )
        options = {**AS_TENSORS, **self.OPTIONS[kind]}
        self.model = load(AutoModel.from_pretrained, **options).eval().to(device)
        self.processor = load(AutoImageProcessor.from_pretrained)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Compute the unit vectors of pictures, [N, E]."""
        inputs = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        token: Tensor = self.model(**inputs.to(self.model.device)).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(token.float(), dim=-1).cpu()


def encode_pictures(
    encoder: PictureEncoder, pictures: Iterable[Image.Image], count: int, title: str
) -> Tensor:
    """Compute the unit vectors of pictures, [N, E], in batches, with a progress bar.

    Args:
        encoder: the model.
        pictures: the pictures, at least one, each read when its turn comes.
        count: the number of pictures.
        title: the text of the progress bar.
    """
    vectors = []
    with tqdm(total=count, desc=title, delay=2) as progress:
        for batch in _batches(pictures):
            vectors.append(encoder.images(batch))
            progress.update(len(batch))
    return torch.cat(vectors)


def _batches(pictures: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    iterator = iter(pictures)
    while batch := list(islice(iterator, BATCH_SIZE)):
        yield batch


def _load(field: str, kind: str, name: str, load: Callable[..., Any], **options: Any) -> Any:
    """Load a part of a model; its failures are sentences about the recipe's field."""
    try:
        return load(name, **options)
    except pickle.UnpicklingError as error:
        reason = "its weights hold more than tensors, such as code, none of which was run"
        cause: Exception = error
    except (OSError, ValueError, KeyError) as error:
        reason, cause = str(error), error
    raise UserError(
        f"evaluation.{field} must name {kind}, as a folder or on the hub (got {name!r}): {reason}"
    ) from cause
