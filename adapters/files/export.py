"""Exporting an adapter so that diffusers, PEFT and our own cascade load it whole."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict

from adapters.atomic import new_folder, replace_folder, temporary_folder
from adapters.base.signature import BaseSignature
from adapters.base.tensor_files import PYTORCH, save_tensors
from adapters.errors import UserError, listed
from adapters.files.for_diffusers import save_for_diffusers
from adapters.files.info import HEADER_KEY, NOTICE, AdapterInfo
from adapters.files.licence import is_deepfloyd
from adapters.files.model_card import write_card
from adapters.files.places import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS
from adapters.files.reading import lora_config
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.approximation import Approximation
from adapters.weights.kinds import ADAPTER_NAME, KINDS, adapted_modules
from adapters.weights.lycoris import LycorisConfig


@dataclass(frozen=True)
class Exported:
    """An exported adapter of one stage."""

    folder: Path
    tensors: int
    """The number of its tensors."""
    approximation: Approximation | None
    """The LoRA that stands in for it in plain diffusers; ``None``: diffusers loads the adapter."""

    def __repr__(self) -> str:
        less = "" if self.approximation is None else f", for diffusers {self.approximation.message}"
        return f"Exported({str(self.folder)!r}, {self.tensors} tensors{less})"

    @property
    def message(self) -> str:
        """A sentence on its folder and the libraries that load it."""
        loaders = f"{self.folder}: load_cascade and PEFT load it"
        if self.approximation is None:
            return f"{loaders}, and so does load_lora_weights of diffusers."
        return (
            f"{loaders}; diffusers cannot load adapters of this kind, so it is also exported as a"
            f" LoRA that approximates it: {self.approximation.message}. For a LoRA of another rank,"
            f" run `python -m adapters.resize {self.folder} --base BASE --rank N --out NEW`."
        )


def export_adapter(
    unet: UNet2DConditionModel,
    folder: str | Path,
    info: AdapterInfo,
    *,
    as_lora_rank: int | None = None,
) -> Exported:
    """Write the attached adapter to ``folder/stage_1`` or ``stage_2``, replacing that folder.

    Args:
        unet: a UNet with the adapter that :func:`adapters.weights.kinds.attach` attached, in the
            state to export.
        folder: the folder of the run's adapters.
        info: the adapter's description; the base's signature and its licence's notice are filled
            in.
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
    info = complete_info(info, unet)
    config = copy(unet.peft_config[ADAPTER_NAME])
    # PEFT has shortened the names to endings, which may match more modules in another model
    config.target_modules = adapted_modules(unet)
    tensors = {
        name: tensor.float().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(
            unet, adapter_name=ADAPTER_NAME, save_embedding_layers=False
        ).items()
    }
    adapter = StageAdapter(Path(folder) / f"stage_{info.stage}", info, config, tensors)
    approximation = None
    if not KINDS[info.spec.kind].has_b:
        approximation = as_lora(adapter, unet, as_lora_rank or info.spec.rank)
    write_adapter(adapter, approximation)
    return Exported(adapter.folder, len(tensors), approximation)


@torch.no_grad()
def as_lora(adapter: StageAdapter, unet: UNet2DConditionModel, rank: int) -> Approximation:
    """Find the LoRA nearest to what an attached adapter adds to each of its modules' weights."""
    approximation = Approximation(rank)
    for name in adapter.modules:
        weight = unet.get_submodule(name).get_base_layer().weight
        approximation.add_update(name, adapter.delta(name, weight))
    return approximation


def write_adapter(adapter: StageAdapter, approximation: Approximation | None = None) -> None:
    """Write an adapter to its folder, replacing the folder.

    The folder then holds

    - ``adapter_model.safetensors`` and ``adapter_config.json``, for ``PeftModel.from_pretrained``
      and :func:`adapters.load_cascade`;
    - ``pytorch_lora_weights.safetensors``, for ``load_lora_weights`` of the stage's diffusers
      pipeline. Its keys are PEFT's (``unet.X.lora_A.weight``), as diffusers drops some keys of
      every other style, and its header holds the PEFT configuration.

    Both safetensors files carry the adapter's ``info`` in their header, and the configurations
    name its base. Values are float32. In diffusers an ``approximation`` stands in for the adapter.
    The same adapter has the same bytes in each file.

    Raises:
        UserError: if a tensor is not finite.
    """
    target, info, tensors = adapter.folder, adapter.info, adapter.state
    config = copy(adapter.config)
    assert not isinstance(config, LycorisConfig), "a file of LyCORIS is not exported again"
    config.inference_mode = True
    if info is not None:
        config.base_model_name_or_path = info.base_model
        config.revision = info.base_revision
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{target} was not written: {len(broken)} of the adapter's {len(tensors)} tensors hold"
            f" values that are NaN or infinite ({listed(broken, 4)}); train it with a lower"
            " optimizer.learning_rate, or from a checkpoint before it diverged."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent) as temporary:
        new = temporary / "new"
        _sort_names(config).save_pretrained(str(new))
        prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        save_tensors(new / PEFT_WEIGHTS, prefixed, _header(info))
        if approximation is not None:
            tensors = approximation.state
            config = lora_config(tensors)
            info = info and approximate_info(info, approximation)
        save_for_diffusers(tensors, config, new / DIFFUSERS_WEIGHTS, _header(info))
        replace_folder(new, target)


def _sort_names(config: PeftConfig) -> PeftConfig:
    """Return a configuration with lists for sets, whose order PEFT would leave to chance."""
    config = copy(config)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    return config


def _header(info: AdapterInfo | None) -> dict[str, str]:
    return PYTORCH | ({HEADER_KEY: info.model_dump_json()} if info else {})


def approximate_info(info: AdapterInfo, approximation: Approximation) -> AdapterInfo:
    """Describe the approximation of an adapter."""
    own = {"kind": "lora", "rank": max(approximation.ranks), "alpha": None, "dropout": 0.0}
    before, error = info.approximation_error or 0.0, approximation.error
    # truncated again: the new loss is orthogonal to the earlier one, so their squares add up
    together = (before**2 + (1 - before**2) * error**2) ** 0.5
    return info.model_copy(
        update={"spec": info.spec.model_copy(update=own), "approximation_error": together}
    )


def complete_info(info: AdapterInfo, unet: UNet2DConditionModel) -> AdapterInfo:
    """Fill in the signature of an adapter's base and its licence's notice."""
    deepfloyd = is_deepfloyd(info.base_model, info.base_revision)
    return info.model_copy(
        update={
            "licence_notice": NOTICE if deepfloyd else None,
            "base_signature": BaseSignature.of(unet),
        }
    )


def save_adapters(adapters: Mapping[int, StageAdapter], folder: Path) -> None:
    """Write LoRAs, by stage, as :func:`export_adapter` does, with a card if they name their base.

    Raises:
        UserError: if the folder is not empty or cannot be written, or an adapter is not a LoRA.
    """
    for adapter in adapters.values():
        if not isinstance(adapter.config, LoraConfig):
            raise UserError(
                f"{adapter.folder} is of kind {adapter.kind}, but only LoRAs can be written here;"
                " copy the folder that it came from."
            )
    with new_folder(folder) as new:
        for stage, adapter in adapters.items():
            write_adapter(replace(adapter, folder=new / f"stage_{stage}"))
        infos = [adapter.info for adapter in adapters.values() if adapter.info is not None]
        if infos:
            write_card(new, infos)
