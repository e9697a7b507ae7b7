"""Models that map pictures, and texts, to unit vectors, whose cosines are the scores.

Shapes: N pictures or texts, E the width of a model's space.
"""

import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils._validators import validate_repo_id
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPModel

# the one that transformers exports refuses to work without torchvision, but does not need it
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from adapters.arguments import expand_name
from adapters.base.hub import split_revision
from adapters.errors import UserError, listed
from adapters.progress import Bar
from unets.loading import is_finite

BATCH_SIZE = 25
"""The number of pictures encoded at once."""

AS_TENSORS = MappingProxyType({"weights_only": True, "dtype": torch.float32})
"""The settings that weights are loaded with: from files that are older than safetensors, PyTorch's
reader builds nothing but tensors, and refuses the rest."""

DINO_OPTIONS = MappingProxyType(
    {
        "vit": {"add_pooling_layer": False},
        "dinov2": {},
        "dinov2_with_registers": {},
    }
)
"""The settings that each type of DINO is loaded with: a ViT leaves out its pooling layer, for which
DINO's files have no weights."""

LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)
"""The errors that transformers raises if a file of a model is missing or damaged."""

SHOWN = 2
"""The number of weights named that a model's files lack."""


class PictureEncoder(Protocol):
    """A model that maps pictures to unit vectors."""

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Compute the unit vectors of pictures, [N, E]."""


class ClipScorer:
    """A CLIP model that maps pictures and texts to unit vectors in its joint space."""

    def __init__(self, clip: str, device: torch.device | str = "cpu") -> None:
        """Load a CLIP model from a folder or hub name.

        Raises:
            UserError: if there is no such model, it is of another type, or its files are damaged or
                hold more than tensors.
        """
        load = partial(_load, "clip", "a CLIP model", clip)
        check_clip(clip)
        self.model = _load_weights(load, CLIPModel).eval().to(device)
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
    """A DINO (arXiv 2104.14294) or DINOv2 (2304.07193), by the CLS token of its last layer."""

    def __init__(self, dino: str, device: torch.device | str = "cpu") -> None:
        """Load a model from a folder or hub name.

        Raises:
            UserError: if there is no such model, it is of another type, or its files are damaged or
                hold more than tensors.
        """
        load = partial(_load, "dino", "a DINO or DINOv2 model", dino)
        options = DINO_OPTIONS[check_dino(dino)]
        self.model = _load_weights(load, AutoModel, **options).eval().to(device)
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
    with Bar(total=count, desc=title, delay=2) as progress:
        for batch in _batches(pictures):
            vectors.append(encoder.images(batch))
            progress.update(len(batch))
    return torch.cat(vectors)


def _batches(pictures: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    iterator = iter(pictures)
    while batch := list(islice(iterator, BATCH_SIZE)):
        yield batch


def check_clip(clip: str) -> None:
    """Raise a UserError if there is no CLIP model of a name; no weights are loaded."""
    _check_type("clip", "a CLIP model", "openai/clip-vit-base-patch32", clip, ["clip"])


def check_dino(dino: str) -> str:
    """Return the type of a DINO model, without its weights; raise a UserError if it is another."""
    known = ("dino", "a DINO or DINOv2 model", "facebook/dino-vits16")
    return _check_type(*known, dino, DINO_OPTIONS)


def _check_type(field: str, kind: str, example: str, name: str, types: Collection[str]) -> str:
    """Return the type that a model's settings name; raise a UserError if it is not in ``types``."""
    found = str(_load(field, kind, name, AutoConfig.from_pretrained).model_type)
    if found not in types:
        raise UserError(
            f"evaluation.{field} must name {kind}, such as {example}, but {name!r} is of the type"
            f" {found!r}; name another."
        )
    return found


def _load_weights(load: Callable[..., Any], model: Any, **options: Any) -> Any:
    """Load a model whose files hold all of its weights, as transformers draws others at random."""

    def load_all(name: str, **where: str) -> Any:
        """Load the model; raise a ValueError if its files lack a weight, or one is not finite."""
        loaded, found = model.from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **AS_TENSORS,
            **options,
            **where,
        )
        problems = {
            "lack": found["missing_keys"],
            "do not fit": {weight for weight, *_ in found["mismatched_keys"]},
            "hold NaN or infinite values in": {
                name for name, weight in loaded.named_parameters() if not is_finite(weight)
            },
        }
        for problem, weights in problems.items():
            if weights:
                raise ValueError(
                    f"the files {problem} the weights {listed(sorted(weights), SHOWN)} that"
                    " config.json describes"
                )
        return loaded

    return load(load_all)


def _load(field: str, kind: str, name: str, load: Callable[..., Any]) -> Any:
    """Load a part of a model; its failures are sentences about the recipe's field."""
    place, revision = split_revision(expand_name(name))
    try:
        _check_place(place)
        with _silence():
            return load(place, **({"revision": revision} if revision else {}))
    except pickle.UnpicklingError as error:
        reason = "its weights hold more than tensors, such as code, none of which was run"
        cause: Exception = error
    except LOADING_ERRORS as error:
        reason, cause = " ".join(str(error).split()) or type(error).__name__, error
    raise UserError(
        f"evaluation.{field} must name {kind}, as a folder or on the hub (got {name!r}): {reason}"
    ) from cause


def _check_place(name: str) -> None:
    """Raise an OSError if a model's name is neither a folder nor a name that the hub may have."""
    if Path(name).is_dir():
        return
    if Path(name).exists():
        raise NotADirectoryError("it is a file, not a folder")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError("there is no such folder") from None


@contextmanager
def _silence() -> Iterator[None]:
    """Silence transformers' reports of what does not load, which a UserError sums up."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
