"""What an exported adapter says of itself, in the header of its safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from adapters.errors import UserError
from adapters.kinds import AdapterSpec
from adapters.names import listed

PEFT_WEIGHTS = "adapter_model.safetensors"
"""The file of an exported stage that PEFT and our own loader read."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""The endings of files that only Python's pickle reads."""

STAGE_FOLDERS = ("stage_1", "stage_2")
"""The folders of an export, one a stage."""

HEADER_KEY = "if_adapter"
"""The entry of the safetensors header that holds an :class:`AdapterInfo` as JSON."""

NOTICE = (
    "DeepFloyd is licensed under the DeepFloyd License,"
    " Copyright (c) Stability AI Ltd. All Rights Reserved."
)
"""The attribution that the DeepFloyd licence asks of whatever is derived from its weights."""

SIGNATURE_LENGTH = 16
"""How many values of a parameter a signature holds."""

SIGNATURE_PARAMETERS = {
    "conv_in": "bias",
    "mid_block.resnets.0.conv1": "bias",
}
"""The parameters it looks at, by module: those that no quantiser touches."""


HALF_PRECISION = (2.0**-7, 1e-6)
"""How far a value may be off in bfloat16 or float16, relatively (2 roundings) and absolutely."""


class BaseSignature(BaseModel):
    """What tells one base UNet from another, wherever it is stored and in whatever precision."""

    model_config = ConfigDict(frozen=True)

    config: dict[str, Any]
    """The UNet's configuration."""
    values: dict[str, tuple[float, ...]]
    """The first values of a parameter of the base itself, by the module's name."""

    @classmethod
    def of(cls, unet: UNet2DConditionModel) -> "BaseSignature":
        """The signature of a UNet, with an adapter attached or without, but none merged."""
        values = {}
        for name, parameter in SIGNATURE_PARAMETERS.items():
            module = unet.get_submodule(name)
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            first = layer.get_parameter(parameter).detach().flatten()[:SIGNATURE_LENGTH]
            values[name] = tuple(first.float().tolist())
        public = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        return cls(
            config=json.loads(json.dumps(public)),  # with lists for tuples, as when read back
            values=values,
        )

    def difference(self, other: "BaseSignature") -> str | None:
        """In what two bases differ; ``None``: they are one and the same.

        Configuration fields that only one of them has are those of another diffusers version.
        Values may differ by half precision's rounding.
        """
        for key in self.config.keys() & other.config.keys():
            if self.config[key] != other.config[key]:
                return f"{key} is {other.config[key]}, not {self.config[key]}"
        for name, values in self.values.items():
            mine, theirs = torch.tensor(values), torch.tensor(other.values[name])
            if mine.shape != theirs.shape or not torch.allclose(mine, theirs, *HALF_PRECISION):
                return f"its weights are others, such as those of {name}"
        return None


class AdapterInfo(BaseModel):
    """All there is to know about an adapter of one stage."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    base_model: str
    """The base it was trained on: a hub name or a folder."""
    base_revision: str | None = None
    """The base's hub revision, where one was asked for."""
    stage: int = Field(ge=1, le=2)
    """The stage it belongs to."""
    spec: AdapterSpec
    """Its kind, rank, alpha, dropout and targets."""
    prompts: tuple[str, ...] = ()
    """Prompts that show what it has learned."""
    step: int
    """Optimizer steps it was trained for."""
    recipe: str = Field(repr=False)
    """The resolved recipe of the run, YAML."""
    version: str
    """The version of this toolkit."""
    created: str | None = None
    """When it was exported (ISO 8601, UTC)."""
    licence_notice: str | None = None
    """The attribution notice that its base's licence asks for."""
    approximation_error: float | None = None
    """The relative Frobenius error, where this approximates another adapter or a model."""
    base_signature: BaseSignature | None = Field(default=None, repr=False)
    """Which weights its base has; filled in at export."""


def read_info(folder: str | Path) -> AdapterInfo:
    """What the exported adapter of one stage says of itself.

    Args:
        folder: the stage's folder, such as ``adapters/stage_1``.

    Raises:
        UserError: where there is no adapter of this toolkit's making.

    Example:
        >>> read_info("runs/quickstart/adapters/stage_1")
        AdapterInfo(base_model='models/if-tiny/stage_1', base_revision=None, stage=1,
        spec=AdapterSpec(kind='lora', rank=4, alpha=None, dropout=0.0, targets='attention'), ...)
    """
    path = Path(folder) / PEFT_WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as an exported adapter ({error}); name the folder that a run"
            " exported, or one of its stage folders."
        ) from error
    return parse_info(header, path)


def parse_info(header: Mapping[str, str], path: Path) -> AdapterInfo:
    """What the header of an adapter's file says.

    Raises:
        UserError: where it says nothing valid.
    """
    try:
        return AdapterInfo.model_validate_json(header[HEADER_KEY], strict=False)
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"{path} does not say which base and stage it belongs to (its header has no valid"
            f" {HEADER_KEY!r} entry); export it again with this version, or load it with diffusers."
        ) from error


def stage_folders(folder: Path) -> list[Path]:
    """The stage folders of an exported folder; itself where it is a single adapter.

    Raises:
        UserError: where it is neither.
    """
    inside = [folder / name for name in STAGE_FOLDERS if (folder / name).is_dir()]
    if not inside:
        find_weights(folder)
    return inside or [folder]


def export_stages(folder: Path) -> list[Path]:
    """The stage folders of an exported folder, which holds one or both.

    Raises:
        UserError: where it is something else, such as one of its stage folders.
    """
    places = stage_folders(folder)
    if places == [folder]:
        raise UserError(
            f"{folder} is a single adapter, and no exported folder with"
            f" {' or '.join(STAGE_FOLDERS)} in it; name the adapters folder of a finished run."
        )
    return places


def find_weights(path: Path) -> Path:
    """Find the safetensors file of a single adapter: itself, or in a folder.

    Raises:
        UserError: where there is none, or several of which none has a name that tells, or only
            pickled ones.
    """
    file = weights_file(path)
    if file is not None:
        return file
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    several = [each.name for each in inside if each.suffix == ".safetensors"]
    pickled = [str(each) for each in inside if each.suffix in PICKLED and each.is_file()]
    if several and path.is_dir():
        raise UserError(
            f"{path} has {len(several)} .safetensors files ({listed(several, 4)}), and none of"
            " their names says which is the adapter; name the one that you mean."
        )
    if pickled:
        raise UserError(
            f"{listed(pickled, 4)} cannot be read, as pickled files may run code; convert pickled"
            " files to .safetensors with the tool that wrote them."
        )
    if path.is_file():
        raise UserError(f"{path} is no adapter, which is a .safetensors file; correct the path.")
    raise UserError(
        f"{path} has no exported adapter (no stage_1, stage_2 or .safetensors file in it); name"
        " the adapters folder of a finished run, or another tool's adapter."
    )


def weights_file(path: Path) -> Path | None:
    """The safetensors file of a single adapter as :func:`find_weights`; ``None``: there is none."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    names = [path / name for name in (PEFT_WEIGHTS, LORA_WEIGHT_NAME_SAFE)]
    found = [name for name in names if name.is_file()] or list(path.glob("*.safetensors"))
    return found[0] if found and (found[0] in names or len(found) == 1) else None
