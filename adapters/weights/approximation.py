"""The best approximation of updates by a LoRA, and its error.

The update of a weight [out, in, ...] is a matrix D [out, in * ...]; a LoRA approximates it by
B A, with B [out, rank] and A [rank, in * ...]. The best B A in the Frobenius norm consists of D's
leading singular vectors (Eckart and Young 1936). It is computed in float64 and kept in float32.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.errors import UserError
from adapters.tables import format_range
from adapters.weights.updates import LowRank


@dataclass
class Approximation:
    """A LoRA that approximates the updates of modules, which are added one by one."""

    rank: int | None
    """The largest rank of a module, which has less if its update needs less; ``None``: no limit."""
    tolerance: float = 0.0
    """The relative Frobenius error allowed in a module, which gets the lowest rank within it."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Its tensors under PEFT's names, float32 on the CPU, for alpha = rank."""
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Squared Frobenius norms of the lost part and of the update, by module or weight."""

    @classmethod
    def limited(cls, rank: int | None, error: float | None) -> "Approximation":
        """Create an approximation with the limits of a command line, which needs at least one.

        Raises:
            UserError: if both are missing, or one is out of range.
        """
        if rank is None and error is None:
            raise UserError("Nothing limits the rank; give --rank, --error or both.")
        if rank is not None and rank < 1:
            raise UserError(f"--rank must be at least 1 (got {rank}).")
        if error is not None and not 0 <= error < 1:
            raise UserError(f"--error must be at least 0 and less than 1 (got {error}).")
        return cls(rank, error or 0.0)

    def add_update(self, module: str, update: LowRank | Tensor) -> None:
        """Approximate the update of a module, [out, in, ...].

        A product is approximated by QR and SVD, without being formed; a tensor by the eigenvectors
        of its smaller Gram matrix.
        """
        if isinstance(update, LowRank):
            assert update.gain is None, "B A is not the whole update of a DoRA"
            q_b, r_b = torch.linalg.qr(update.b.double() * update.scaling)
            q_a, r_a = torch.linalg.qr(update.a.flatten(1).double().T)
            u, values, vh = torch.linalg.svd(r_b @ r_a.T)
            squares = values.square()
            kept = slice(self._choose_rank(squares))
            b, a = q_b @ (u[:, kept] * values[kept]), vh[kept] @ q_a.T
        else:
            d = update.flatten(1).double()
            wide = d.shape[0] < d.shape[1]
            squares, vectors = torch.linalg.eigh(d @ d.T if wide else d.T @ d)  # ascending
            squares = squares.clamp(min=0).flip(0)
            leading = vectors[:, -self._choose_rank(squares) :]
            b, a = (leading, leading.T @ d) if wide else (d @ leading, leading.T)
        inputs = update.shape[1:]
        ones = [1] * (len(inputs) - 1)  # a convolution's B is a convolution of 1 x 1
        for side, tensor in (("A", a.reshape(-1, *inputs)), ("B", b.reshape(*b.shape, *ones))):
            self.state[f"{module}.lora_{side}.weight"] = tensor.float().cpu().contiguous()
        self.squares[module] = (float(squares[len(a) :].sum()), float(squares.sum()))

    def add_lost(self, weight: str, update: Tensor) -> None:
        """Count the update of a weight that no LoRA adapts, such as a bias, as lost."""
        square = float(update.double().square().sum())
        self.squares[weight] = (square, square)

    def _choose_rank(self, squares: Tensor) -> int:
        """Choose the rank by squared singular values in descending order."""
        lost = squares.flip(0).cumsum(0).flip(0)  # squared errors, by the rank that is kept
        needed = max(int((lost > self.tolerance**2 * lost[0]).sum()), 1)
        return needed if self.rank is None else min(self.rank, needed)

    @property
    def ranks(self) -> list[int]:
        """The ranks of its modules."""
        return [len(tensor) for name, tensor in self.state.items() if name.endswith("A.weight")]

    @property
    def error(self) -> float:
        """The relative Frobenius error of all modules together, 0 to 1."""
        lost, whole = (sum(column) for column in zip(*self.squares.values(), strict=True))
        return _relative(lost, whole)

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the largest relative error, and this error."""
        errors = {module: _relative(*squares) for module, squares in self.squares.items()}
        return max(errors.items(), key=lambda item: item[1])

    @property
    def message(self) -> str:
        """A summary of its ranks and errors."""
        worst, error = self.worst
        return (
            f"rank {format_range(self.ranks)}, relative Frobenius error {self.error:.2g}"
            f" (worst {error:.2g}, in {worst})"
        )


def _relative(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0
