"""The kinds of adapter, the modules that they attach to, and attaching them.

Checking a recipe needs these names, so torch, diffusers and PEFT are imported only on use.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import UserError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from peft import PeftConfig
    from torch import Tensor, nn

ADAPTER_NAME = "default"
"""PEFT's name for the adapter within a UNet."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
"""All projections of IF's attention; text enters through the last two alone."""

CONVOLUTION = ("conv1", "conv2", "conv_shortcut")
"""The convolutions of the ResNet blocks."""

PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ATTENTION,
        "attention+conv": ATTENTION + CONVOLUTION,
        "all": ("*",),  # every Linear and Conv2d
    }
)

ROOTS = (
    *("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out"),
    *("time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj"),
)
"""The top-level modules of IF's UNets that adapters attach to."""


class AdapterSpec(BaseModel):
    """Settings of an adapter to attach, and the modules to attach it to."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    kind: Literal["lora", "rslora", "dora", "loha", "lokr", "oft"] = "lora"
    """LoRA, rank-stabilised LoRA, DoRA, LoHa, LoKr or OFT."""
    rank: Annotated[int, Field(ge=1, le=2**16)] = 4
    """The rank (OFT: the number of blocks, lowered to a divisor of each module's input width)."""
    alpha: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """The update is scaled by alpha / rank (rsLoRA: / sqrt(rank); OFT: not at all); ``None``:
    alpha = rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input (LoHa, LoKr: on rows of its update; OFT: on its blocks)."""
    targets: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = "attention"
    """A preset (``attention``, ``attention+conv``, ``all``: whatever the kind adapts) or patterns
    of module names: a pattern matches whole names and their endings after a dot, and ``*`` stands
    for anything, dots included (``to_q``, ``mid_block.*.to_q``, ``up_blocks.0.*``)."""


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: its PEFT configuration, and what can load it."""

    peft_type: str
    """PEFT's name for it, under which PEFT registers its configuration."""
    fields: Mapping[str, str]
    """Configuration fields set from an :class:`AdapterSpec`, and the spec's field for each."""
    settings: Mapping[str, int] = field(default_factory=dict)
    """The configuration's fields that make it this kind."""
    has_b: bool = False
    """True if it has the matrices B of a LoRA; ``load_lora_weights`` of the diffusers pipelines
    loads only such kinds."""
    alone: bool = False
    """True if these pipelines load it only on its own, without ``set_adapters`` and ``hotswap``."""
    convolutions: bool = True
    """True if it adapts ``Conv2d`` modules as well as ``Linear`` ones."""
    trains_in_unet_precision: bool = False
    """True if it trains well with forward and backward passes in the UNet's precision; other kinds'
    passes are in float32, as weights and optimizer always are."""

    def peft_config(self, spec: AdapterSpec) -> "PeftConfig":
        """Build the PEFT configuration of a spec, without targets."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        own = spec.model_dump() | {"alpha": spec.alpha or spec.rank}
        fields = {theirs: own[ours] for theirs, ours in self.fields.items()}
        return PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type](**fields, **self.settings)


_LORA = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
_LYCORIS = {"r": "rank", "alpha": "alpha", "rank_dropout": "dropout"}

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "lora": Kind("LORA", _LORA, has_b=True, trains_in_unet_precision=True),
        "rslora": Kind(
            "LORA", _LORA, {"use_rslora": True}, has_b=True, trains_in_unet_precision=True
        ),
        "dora": Kind("LORA", _LORA, {"use_dora": True}, has_b=True, alone=True),
        "loha": Kind("LOHA", _LYCORIS),
        "lokr": Kind("LOKR", _LYCORIS),
        # PEFT rotates a convolution's patches without its padding, so it cannot start as identity
        "oft": Kind("OFT", {"r": "rank"}, {"oft_block_size": 0}, convolutions=False),
    }
)


def match_targets(unet: "nn.Module", targets: str | Iterable[str]) -> tuple[str, ...]:
    """Find the full names of the modules that targets match, in the model's order.

    Args:
        unet: the model; only its ``Linear`` and ``Conv2d`` modules can be targets.
        targets: a preset of :data:`PRESETS`, a pattern, or several patterns. A pattern is a glob
            that matches a module's full name or any ending of it that follows a dot.

    Raises:
        UserError: if a pattern matches no module, naming the closest names.
    """
    from torch import nn

    names = [n for n, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    preset = PRESETS.get(targets) if isinstance(targets, str) else None
    patterns = preset or ((targets,) if isinstance(targets, str) else tuple(targets))
    found: set[str] = set()
    for pattern in patterns:
        globs = (pattern, f"*.{pattern}")
        matching = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
        if not (matching or preset):
            dots = pattern.count(".")  # compared with endings of names that have as many
            endings = dict.fromkeys(".".join(name.split(".")[-dots - 1 :]) for name in names)
            closest = difflib.get_close_matches(pattern, endings, n=3, cutoff=0)
            raise UserError(
                f"The target {pattern!r} matches no Linear or Conv2d module of the UNet; the"
                f" closest are {', '.join(closest)}, and the presets are {', '.join(PRESETS)}."
            )
        found.update(matching)
    return tuple(name for name in names if name in found)


def peft_config(unet: "nn.Module", spec: AdapterSpec) -> "PeftConfig":
    """Build the PEFT configuration of a spec, with its targets as full module names.

    Raises:
        UserError: if a target matches no module, or one that the kind does not adapt.
    """
    from torch import nn

    kind = KINDS[spec.kind]
    targets = match_targets(unet, spec.targets)
    if not kind.convolutions:
        other = [name for name in targets if isinstance(unet.get_submodule(name), nn.Conv2d)]
        if other and spec.targets != "all":
            raise UserError(
                f"An adapter of kind {spec.kind!r} adapts Linear modules only, and the targets"
                f" {spec.targets!r} also match the Conv2d {other[0]!r}; choose the targets"
                " 'attention' or 'all', or another kind."
            )
        targets = tuple(name for name in targets if name not in other)
    config = kind.peft_config(spec)
    config.target_modules = set(targets)
    return config


def attach(
    unet: "UNet2DConditionModel", spec: AdapterSpec, *, seed: int = 0
) -> "dict[str, nn.Parameter]":
    """Freeze a UNet and attach a fresh adapter, which changes nothing yet (OFT: except rounding).

    Args:
        unet: the base, in any precision.
        spec: the adapter.
        seed: the seed of its initial values; the global generator is left as it was.

    Returns:
        :func:`adapter_parameters`: float32, trainable, on the UNet's device.

    Raises:
        UserError: as :func:`peft_config`.

    Example:
        >>> unet = UNet2DConditionModel.from_pretrained("models/if-tiny/stage_1", subfolder="unet")
        >>> parameters = attach(unet, AdapterSpec(rank=2, targets=("to_q", "mid_block.*.conv1")))
        >>> sum(parameter.numel() for parameter in parameters.values())
        10112
    """
    import torch

    config = peft_config(unet, spec)
    unet.requires_grad_(False)
    blank = unet.device.type == "meta"  # nothing is drawn then, so that threads may attach at once
    with unet.device if blank else torch.random.fork_rng(devices=[]):
        if not blank:
            torch.default_generator.manual_seed(seed)  # PEFT initialises on the CPU
        unet.add_adapter(config, adapter_name=ADAPTER_NAME)
    _check_trainable(unet)
    for parameter in adapter_parameters(unet).values():
        parameter.data = parameter.data.float()
    _measure_magnitudes(unet)
    unet.train(unet.training)  # the new layers take on the UNet's mode
    return adapter_parameters(unet)


def _check_trainable(unet: "nn.Module") -> None:
    """Assert that no layer of an adapter is frozen: such a layer would return no gradient."""
    from unets.frozen import FrozenConv2d, FrozenLinear

    for name, module in unet.named_modules():
        if isinstance(module, FrozenLinear | FrozenConv2d):
            owned = [p for p in module.parameters(recurse=False) if p.requires_grad]
            assert not owned, f"{name} is trainable, but frozen layers return no gradient"


def _measure_magnitudes(unet: "nn.Module") -> None:
    """Measure DoRA's initial magnitudes in float32, as its forward pass does.

    PEFT has measured them in the base's precision, but in bfloat16 a fresh DoRA would then not be
    the identity.
    """
    from peft.tuners.lora import LoraLayer

    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            for name, magnitude in layer.lora_magnitude_vector.items():
                magnitude.update_layer(
                    base_layer=layer.get_base_layer(),
                    lora_A=layer.lora_A[name].weight,
                    lora_B=layer.lora_B[name].weight,
                    scaling=layer.scaling[name],
                )


def adapted_modules(unet: "UNet2DConditionModel") -> list[str]:
    """List the full names of the modules that an adapter is attached to, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_adapter(unet: "nn.Module") -> Iterator[None]:
    """Let a UNet predict as its base does, whatever its adapter, while the ``with`` block runs.

    Nothing else changes. PEFT's own ``disable_adapters`` also stops the adapter's tensors from
    requiring gradients, which a recorded or compiled training step has come to rely on.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def adapter_parameters(unet: "UNet2DConditionModel") -> "dict[str, nn.Parameter]":
    """Return the parameters of the attached adapter by their names in the UNet."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    mark = PEFT_TYPE_TO_PREFIX_MAPPING[unet.peft_config[ADAPTER_NAME].peft_type]
    return {name: p for name, p in unet.named_parameters() if f".{mark}" in name}


def adapter_state(unet: "UNet2DConditionModel") -> "dict[str, Tensor]":
    """Return the values of :func:`adapter_parameters`, sharing their memory."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(unet).items()}
