"""Signatures that tell one base UNet from another by its configuration and a few weights."""

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from adapters.errors import listed

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SIGNATURE_LENGTH = 16
"""The number of values that a signature holds of each parameter."""

SIGNATURE_PARAMETERS = {
    "conv_in": "bias",
    "mid_block.resnets.0.conv1": "bias",
}
"""The parameters that a signature holds values of, by module: no quantiser touches these."""

HALF_PRECISION = (2.0**-7, 1e-6)
"""The largest relative (two roundings of bfloat16) and absolute difference of equal parameters."""


class BaseSignature(BaseModel):
    """Configuration and values that tell one base UNet from another, in any precision."""

    model_config = ConfigDict(frozen=True)

    config: dict[str, Any]
    """The UNet's configuration."""
    values: dict[str, tuple[float, ...]]
    """The first values of a parameter of the base itself, by module name."""

    @classmethod
    def of(cls, unet: "UNet2DConditionModel") -> "BaseSignature":
        """Take the signature of a UNet; an adapter may be attached to it, but none merged."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        values = {}
        for name, parameter in SIGNATURE_PARAMETERS.items():
            module = unet.get_submodule(name)
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            first = layer.get_parameter(parameter).detach().flatten()[:SIGNATURE_LENGTH]
            values[name] = tuple(first.float().tolist())
        public = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        return cls(
            config=json.loads(json.dumps(public)),  # lists for tuples, as JSON reads them back
            values=values,
        )

    def difference(self, other: "BaseSignature") -> str | None:
        """Describe the first difference between two bases; ``None``: they are the same.

        Configuration fields that only one of them has come from another diffusers version, and are
        ignored. Values may differ by the rounding of half precision.
        """
        for key in self.config:  # in its order, in which the first says most
            if key in other.config and self.config[key] != other.config[key]:
                return f"{key} is {other.config[key]}, not {self.config[key]}"
        if unknown := self.values.keys() - other.values.keys():
            return f"the signature is of {listed(sorted(unknown))}, not of {listed(other.values)}"
        relative, absolute = HALF_PRECISION
        for name, values in self.values.items():
            others = other.values[name]
            if len(values) != len(others) or not all(
                abs(mine - theirs) <= absolute + relative * abs(theirs)
                for mine, theirs in zip(values, others, strict=True)
            ):
                return f"its weights differ, for example in {name}"
        return None
