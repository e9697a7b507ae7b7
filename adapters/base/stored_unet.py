"""A UNet's weights on disk, read one at a time."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from adapters.arguments import expand_home
from adapters.base.component_files import ModelFiles
from adapters.base.configurations import CONFIG
from adapters.base.signature import SIGNATURE_PARAMETERS, BaseSignature
from adapters.base.source import Source, source_of
from adapters.errors import listed


@dataclass(frozen=True)
class StoredUNet:
    """A UNet in diffusers' layout; in any other, properties and methods raise a UserError."""

    name: str
    """The model's name, for messages."""
    model: ModelFiles
    """The files of the model that it is a component of."""
    part: str = "unet"
    """The component's name."""

    @classmethod
    def of(cls, source: Source) -> "StoredUNet":
        """Return the UNet of a stage."""
        return cls(source.name, source.files)

    @classmethod
    def find(
        cls, name: str, revision: str | None = None, variant: str | None = None
    ) -> "StoredUNet":
        """Find the UNet of a stage's folder or hub name, or in a folder of its own."""
        folder = expand_home(name).resolve()
        if (folder / CONFIG).is_file():
            return cls(name, ModelFiles(str(folder.parent), None, variant), folder.name)
        return cls.of(source_of(name, revision, variant))

    @cached_property
    def folder(self) -> Path:
        """The UNet's folder, with its configuration."""
        return self.model.fetch([f"{self.part}/{CONFIG}"]) / self.part

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The shape and precision of every weight by name, on the meta device, in model order."""
        wanted, stored = self._blank.state_dict(), self._stored
        odd = [n for n in wanted if n not in stored or stored[n][1].shape != wanted[n].shape]
        with self.model.reading():
            if odd:
                raise ValueError(f"missing, or of another shape than {CONFIG} says: {listed(odd)}")
        return {name: stored[name][1] for name in wanted}

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The UNet on the meta device, with values for those parameters that tell bases apart."""
        names = (f"{module}.{parameter}" for module, parameter in SIGNATURE_PARAMETERS.items())
        values = {name: self.read(name) for name in names}
        with self.model.reading():
            self._blank.load_state_dict(values, strict=False, assign=True)
        return self._blank

    @property
    def signature(self) -> BaseSignature:
        """Its configuration and values, which tell it from other bases."""
        return BaseSignature.of(self.unet)

    def read(self, name: str) -> Tensor:
        """Read one of its weights, in the precision it is stored in, into memory of its own.

        The file is read rather than mapped, as pages of a mapping count as memory of the process
        for as long as the file is open.
        """
        _ = self.weights  # checks that all of them are there
        file, _ = self._stored[name]
        with self.model.reading(), safe_open(file, "pt", backend="pread") as opened:
            return opened.get_tensor(name)

    @cached_property
    def _stored(self) -> dict[str, tuple[Path, Tensor]]:
        """The file of every stored weight, and the weight on the meta device."""
        stored: dict[str, tuple[Path, Tensor]] = {}
        for file in self.model.safetensors(self.part):
            with self.model.reading(), safe_open(file, "pt") as opened:
                names = opened.keys()
                stored |= {name: (file, opened.get_tensor(name).to("meta")) for name in names}
        return stored

    @cached_property
    def _blank(self) -> UNet2DConditionModel:
        config = self.model.read_config(f"{self.part}/{CONFIG}")
        with self.model.reading(), torch.device("meta"):
            if config.get("_class_name") != UNet2DConditionModel.__name__:
                raise ValueError(f"its {CONFIG} is not that of a {UNet2DConditionModel.__name__}")
            return UNet2DConditionModel.from_config(config)
