"""Loading the stages of a cascade from folders or hub names, with diffusers' own pipelines."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
from torch import Tensor
from transformers import CLIPConfig

from adapters.errors import UserError

PIPELINES: dict[int, type[DiffusionPipeline]] = {
    1: IFPipeline,
    2: IFSuperResolutionPipeline,
    3: StableDiffusionUpscalePipeline,
}
"""The pipeline of each stage."""

GUARDS = ("safety_checker", "feature_extractor", "watermarker")
"""The components that guard a stage's pictures; always kept as the base has them."""

Loaded = TypeVar("Loaded")

# diffusers prints every safety checker that is handed to it, layer by layer
logging.getLogger("diffusers.pipelines.pipeline_loading_utils").addFilter(
    lambda record: "non-standard module" not in record.getMessage()
)


class SafetyChecker(IFSafetyChecker):  # type: ignore[misc]  # diffusers is untyped
    """IF's safety checker, such that it loads and runs with current libraries.

    In diffusers 0.42 it omits the ``post_init`` without which transformers 5 cannot load it, and it
    blackens arrays only, while the x4 upscaler hands it a tensor.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self, clip_input: Tensor, images: np.ndarray | Tensor, **thresholds: float
    ) -> tuple[np.ndarray | Tensor, list[bool], list[bool]]:
        """Blacken flagged pictures of ``images``, [N, ...] in any layout, in place."""
        if not isinstance(images, Tensor):
            return super().forward(clip_input, images, **thresholds)
        flags = super().forward(clip_input, np.zeros(len(images)), **thresholds)[1:]
        images[torch.tensor(flags).any(dim=0)] = 0
        return images, *flags


@dataclass(frozen=True)
class Source:
    """Where a stage's files are: a folder, or a hub name with a revision and a variant."""

    name: str
    stage: int
    revision: str | None = None
    variant: str | None = None

    def pipeline(self, dtype: torch.dtype, **components: Any) -> DiffusionPipeline:
        """The stage's pipeline with all of its guards; ``components`` replace others.

        Raises:
            UserError: where there is no such model, or one of another stage.
        """
        index = self._reading(PIPELINES[self.stage].load_config, self.name, revision=self.revision)
        wanted, found = PIPELINES[self.stage].__name__, index["_class_name"]
        if found != wanted:
            raise UserError(
                f"Stage {self.stage} needs a model of class {wanted}, but {self.name} is a"
                f" {found}; give each stage its own model."
            )
        checker = index.get("safety_checker", (None, None))[1]
        if checker == IFSafetyChecker.__name__ and "safety_checker" not in components:
            components["safety_checker"] = self.component(SafetyChecker, dtype)
        return self._reading(
            PIPELINES[self.stage].from_pretrained,
            self.name,
            **components,
            dtype=dtype,
            **self._options,
        )

    def component(self, kind: type[Loaded], dtype: torch.dtype) -> Loaded:
        """One component of the stage, from its own folder of the model."""
        folders: dict[type, str] = {SafetyChecker: "safety_checker", UNet2DConditionModel: "unet"}
        loader: Callable[..., Loaded] = kind.from_pretrained  # type: ignore[attr-defined]
        return self._reading(
            loader, self.name, subfolder=folders[kind], dtype=dtype, **self._options
        )

    @property
    def picture_size_px(self) -> int:
        """The side of the stage's pictures, from its UNet's configuration.

        Raises:
            UserError: where there is no such model.
        """
        load = UNet2DConditionModel.load_config
        config = self._reading(load, self.name, subfolder="unet", revision=self.revision)
        return int(config["sample_size"])

    @property
    def _options(self) -> dict[str, Any]:
        return {"revision": self.revision, "variant": self.variant, "use_safetensors": True}

    def _reading(self, load: Callable[..., Loaded], *args: Any, **kwargs: Any) -> Loaded:
        if not Path(self.name).is_dir() and self.name.count("/") != 1:
            raise UserError(
                f"The Stage {self.stage} model {self.name!r} is neither a folder that exists nor a"
                " hub name (owner/name); correct the path."
            )
        try:
            return load(*args, **kwargs)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"The Stage {self.stage} model {self.name!r} cannot be loaded; check its name, and"
                f" on the hub accept its licence and log in (hf auth login): {reason}"
            ) from error
