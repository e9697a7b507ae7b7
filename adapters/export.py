"""Exporting an adapter so that diffusers, PEFT and our own cascade load it whole."""

import json
import tempfile
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import IFPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from adapters.errors import UserError
from adapters.files import replace_folder
from adapters.formats import lora_config
from adapters.info import (
    HEADER_KEY,
    NOTICE,
    PEFT_WEIGHTS,
    AdapterInfo,
    BaseSignature,
    read_info,
)
from adapters.kinds import ADAPTER_NAME, adapted_modules, diffusers_loads
from adapters.licence import is_deepfloyd
from adapters.low_rank import Approximation
from adapters.lycoris import LycorisConfig
from adapters.merging import StageAdapter
from adapters.names import listed

__all__ = ["AdapterInfo", "Exported", "export_adapter", "read_info"]


@dataclass(frozen=True)
class Exported:
    """An exported adapter of one stage."""

    folder: Path
    tensors: int
    """How many tensors the adapter has."""
    approximation: Approximation | None
    """What plain diffusers pipelines load in its stead; ``None``: they load it itself."""

    def __repr__(self) -> str:
        less = "" if self.approximation is None else f", for diffusers {self.approximation.message}"
        return f"Exported({str(self.folder)!r}, {self.tensors} tensors{less})"

    @property
    def message(self) -> str:
        """Where it is and what loads it, for people."""
        loaders = f"{self.folder}: load_cascade and PEFT load it"
        if self.approximation is None:
            return f"{loaders}, and so does load_lora_weights of diffusers."
        return (
            f"{loaders}; diffusers cannot load adapters of this kind, and gets an approximation as"
            f" a LoRA: {self.approximation.message}. One of another rank is made by `python -m"
            f" adapters.resize {self.folder} --base BASE --rank N --out NEW`."
        )


def export_adapter(
    unet: UNet2DConditionModel,
    folder: str | Path,
    info: AdapterInfo,
    *,
    as_lora_rank: int | None = None,
) -> Exported:
    """Write the attached adapter to ``folder/stage_1`` or ``folder/stage_2``, replacing it whole.

    Args:
        unet: a UNet with an adapter of :func:`adapters.kinds.attach`, with the weights to export.
        folder: the folder of the run's adapters.
        info: what the adapter says of itself; the time, the base's signature and its licence's
            notice are filled in.
        as_lora_rank: the rank of the LoRA that stands in for a kind that diffusers cannot load;
            ``None``: the adapter's own.

    Example:
        >>> base, spec = "models/if-tiny/stage_1", AdapterSpec(kind="dora", rank=2)
        >>> unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        >>> parameters = attach(unet, spec)  # and train them
        >>> info = AdapterInfo(
        ...     base_model=base, stage=1, spec=spec, step=100, recipe="", version="0.1.0"
        ... )
        >>> export_adapter(unet, "my_adapters", info)
        Exported('my_adapters/stage_1', 198 tensors)
    """
    info = completed(info, unet)
    config = peft_config_of(unet, info)
    tensors = {
        name: tensor.float().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(
            unet, adapter_name=ADAPTER_NAME, save_embedding_layers=False
        ).items()
    }
    adapter = StageAdapter(Path(folder) / f"stage_{info.stage}", info, config, tensors)
    approximation = None
    if not diffusers_loads(info.spec):
        approximation = as_lora(adapter, unet, as_lora_rank or info.spec.rank)
    write_adapter(adapter, approximation)
    return Exported(adapter.folder, len(tensors), approximation)


@torch.no_grad()
def as_lora(adapter: StageAdapter, unet: UNet2DConditionModel, rank: int) -> Approximation:
    """The LoRA that is nearest to what an attached adapter adds to each of its modules' weights."""
    approximation = Approximation(rank)
    for name in adapter.modules:
        module = unet.get_submodule(name).get_base_layer()
        approximation.add_update(name, adapter.delta(name, module, module.weight))
    return approximation


def write_adapter(adapter: StageAdapter, approximation: Approximation | None = None) -> None:
    """Write an adapter to its folder, replacing that whole.

    The folder receives

    - ``adapter_model.safetensors`` and ``adapter_config.json``, for ``PeftModel.from_pretrained``
      and :func:`adapters.load_cascade`;
    - ``pytorch_lora_weights.safetensors``, for ``load_lora_weights`` of the stage's diffusers
      pipeline. Its keys are PEFT's (``unet.X.lora_A.weight``), the only ones of which diffusers
      drops none, and its header has the PEFT configuration.

    Both safetensors files carry the adapter's ``info`` in their header. Values are float32.

    Args:
        adapter: the adapter.
        approximation: a LoRA for diffusers in its stead.

    Raises:
        UserError: where a tensor is not finite.
    """
    info, config, tensors = adapter.info, adapter.config, adapter.state
    assert not isinstance(config, LycorisConfig), "a file of LyCORIS is not exported again"
    target = adapter.folder
    check_finite(tensors, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as temporary:
        new = Path(temporary) / "new"
        config.save_pretrained(str(new))
        prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        save_file(prefixed, new / PEFT_WEIGHTS, metadata=header_of(info))
        if approximation is not None:
            tensors = approximation.state
            config = lora_config(tensors, {}, None)
            info = info and approximated(info, approximation)
        save_for_diffusers(tensors, config, new / LORA_WEIGHT_NAME_SAFE, header_of(info))
        replace_folder(new, target)


def check_finite(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Raise a UserError that names the tensors which are not finite."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{target} is not written: {len(broken)} of the adapter's {len(tensors)} tensors hold"
            f" values that are NaN or infinite ({listed(broken, 4)}); train it with a lower"
            " optimizer.learning_rate, or from a checkpoint before it diverged."
        )


def header_of(info: AdapterInfo | None) -> dict[str, str]:
    """The header of an adapter's safetensors file."""
    return {"format": "pt"} | ({HEADER_KEY: info.model_dump_json()} if info else {})


def approximated(
    info: AdapterInfo, approximation: Approximation, kind: str = "lora"
) -> AdapterInfo:
    """What the approximation of an adapter says of itself."""
    own = {"kind": kind, "rank": max(approximation.ranks), "alpha": None, "dropout": 0.0}
    before, error = info.approximation_error or 0.0, approximation.error
    # truncated once more: what is lost is orthogonal to what was lost before
    together = (before**2 + (1 - before**2) * error**2) ** 0.5
    return info.model_copy(
        update={"spec": info.spec.model_copy(update=own), "approximation_error": together}
    )


def save_for_diffusers(
    tensors: dict[str, Tensor], config: PeftConfig, path: Path, header: dict[str, str]
) -> None:
    """Write what ``load_lora_weights`` reads; only settings that differ from PEFT's own defaults.

    Fewer settings keep the file loadable by PEFT versions that lack the newest ones.
    """
    prefix = IFPipeline.unet_name
    defaults = type(config)().to_dict()
    settings: dict[str, Any] = {
        f"{prefix}.{key}": value
        for key, value in plain(config).items()
        if value != defaults[key] or key in ("r", "lora_alpha")
    }
    save_file(
        {f"{prefix}.{name}": tensor for name, tensor in tensors.items()},
        path,
        metadata=header | {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True)},
    )


def plain(config: PeftConfig) -> dict[str, Any]:
    """A PEFT configuration in JSON's types; sets become sorted lists."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if key not in ("base_model_name_or_path", "revision", "inference_mode")
    }


def peft_config_of(unet: UNet2DConditionModel, info: AdapterInfo) -> PeftConfig:
    """The PEFT configuration that is exported: the attached one, its targets as full names.

    On attaching, PEFT shortens names to endings, which may match more modules in another model.
    """
    config = of_base(unet.peft_config[ADAPTER_NAME], info)
    config.target_modules = adapted_modules(unet)
    return config


def of_base(config: PeftConfig, info: AdapterInfo | None) -> PeftConfig:
    """A copy of a PEFT configuration that names an adapter's base, where that is known."""
    config = copy(config)
    config.base_model_name_or_path = info and info.base_model
    config.revision = info and info.base_revision
    config.inference_mode = True
    return config


def completed(info: AdapterInfo, unet: UNet2DConditionModel) -> AdapterInfo:
    """``info`` with what export knows better."""
    deepfloyd = is_deepfloyd(info.base_model, info.base_revision)
    return info.model_copy(
        update={
            "created": info.created or datetime.now(UTC).isoformat(timespec="seconds"),
            "licence_notice": NOTICE if deepfloyd else None,
            "base_signature": BaseSignature.of(unet),
        }
    )
