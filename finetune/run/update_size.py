"""The size of the update that an adapter in training adds to its UNet's weights, by block."""

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from adapters.merging.measure import group_by_block
from adapters.weights.kinds import ADAPTER_NAME
from adapters.weights.updates import as_matrix, delta, low_rank


class UpdateSize:
    """The ratio ‖ΔW‖ / ‖W‖ (Frobenius) over the adapted modules of each block of a UNet.

    The ratios show which blocks the adapter changes: one that stays at zero learns nothing.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.layers = {n: m for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)}
        self.blocks = group_by_block(self.layers)
        self._weights: dict[str, Tensor] = {}
        """Squared norms of the base's weights, which do not change."""

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Measure the current ratios by block, waiting for the device once."""
        if not self._weights:
            self._weights = {
                name: _square(layer.get_base_layer().weight) for name, layer in self.layers.items()
            }
        training = self.unet.training
        self.unet.eval()  # in training mode OFT drops blocks of its rotation
        updates = {name: squared_norm(layer) for name, layer in self.layers.items()}
        self.unet.train(training)
        ratios = [
            (_total(updates, names) / _total(self._weights, names)).sqrt()
            for names in self.blocks.values()
        ]
        return dict(zip(self.blocks, torch.stack(ratios).tolist(), strict=True))


def squared_norm(layer: BaseTunerLayer) -> Tensor:
    """Compute the squared Frobenius norm of an adapter's update of a layer's weight, a scalar."""
    if isinstance(layer, LoraLayer):
        a, b = (side[ADAPTER_NAME].weight.float() for side in (layer.lora_A, layer.lora_B))
        scaling = layer.scaling[ADAPTER_NAME]
        if ADAPTER_NAME not in layer.lora_magnitude_vector:
            a, b = a.flatten(1), b.flatten(1)  # ‖B A‖² = Σ (BᵀB ⊙ AAᵀ), without forming B A
            return (b.T @ b * (a @ a.T)).sum() * scaling**2
        weight = layer.get_base_layer().weight
        magnitude = layer.lora_magnitude_vector[ADAPTER_NAME].weight
        return _square(delta(weight, low_rank(weight, b, a, scaling, magnitude)))
    if isinstance(layer, OFTLayer):  # W Rᵀ - W
        weight = as_matrix(layer.get_base_layer().weight).float()
        rotation = layer.get_delta_weight(ADAPTER_NAME).float()
        return _square(weight @ rotation.T - weight)
    return _square(layer.get_delta_weight(ADAPTER_NAME))


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()


def _total(squares: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.stack([squares[name] for name in names]).sum()
