"""The best approximation of updates by a LoRA, and what it loses.

The update of a weight [out, in, ...] is a matrix D [out, in * ...]; a LoRA has it as B A with
B [out, rank] and A [rank, in * ...]. The best in the Frobenius norm are D's leading singular
vectors (Eckart and Young 1936). Computed in float64, kept in float32.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Approximation:
    """A LoRA that approximates the updates of modules, one after the other."""

    rank: int
    """Its largest rank; a module with a smaller update has less."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Its tensors under PEFT's names, float32 on the CPU, for alpha = rank."""
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Squared Frobenius norms by module: of what was lost, and of the update."""

    def add_product(self, module: str, b: Tensor, a: Tensor) -> None:
        """Approximate B A, B [out, r] and A [r, in, ...], without forming it: by QR, then SVD."""
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.flatten(1).double().T)
        u, values, vh = torch.linalg.svd(r_b @ r_a.T)
        kept = slice(min(self.rank, len(values)))
        left = q_b @ (u[:, kept] * values[kept])
        self._keep(module, left, vh[kept] @ q_a.T, values.square(), a.shape)

    def add_update(self, module: str, update: Tensor) -> None:
        """Approximate D [out, in, ...], by the eigenvectors of its smaller Gram matrix."""
        d = update.flatten(1).double()
        wide = d.shape[0] < d.shape[1]
        squares, vectors = torch.linalg.eigh(d @ d.T if wide else d.T @ d)  # ascending
        leading = vectors[:, -self.rank :]
        b, a = (leading, leading.T @ d) if wide else (d @ leading, leading.T)
        self._keep(module, b, a, squares.clamp(min=0).flip(0), update.shape)

    def _keep(self, module: str, b: Tensor, a: Tensor, squares: Tensor, shape: torch.Size) -> None:
        ones = [1] * (len(shape) - 2)  # a convolution's B is a convolution of 1 x 1
        tensors = {"A": a.reshape(-1, *shape[1:]), "B": b.reshape(*b.shape, *ones)}
        for side, tensor in tensors.items():
            self.state[f"{module}.lora_{side}.weight"] = tensor.float().cpu().contiguous()
        self.squares[module] = (float(squares[self.rank :].sum()), float(squares.sum()))

    @property
    def error(self) -> float:
        """The relative Frobenius error of all modules together, 0 to 1."""
        lost, whole = (sum(column) for column in zip(*self.squares.values(), strict=True))
        return _relative(lost, whole)

    @property
    def message(self) -> str:
        """Rank and errors, for people."""
        errors = {module: _relative(*squares) for module, squares in self.squares.items()}
        worst = max(errors, key=lambda module: errors[module])
        return (
            f"rank {self.rank}, relative Frobenius error {self.error:.2g}"
            f" (worst {errors[worst]:.2g}, in {worst})"
        )


def _relative(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0
