"""Decisions that all processes of a run take together."""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor


def agree(value: int, accelerator: Accelerator) -> int:
    """Return on every process the largest value of any, waiting for all of them."""
    values = accelerator.gather(torch.tensor([value], device=accelerator.device))
    assert isinstance(values, Tensor)
    return int(values.max())


class Vote:
    """The largest value that any process has given, one call late and without a wait.

    Every process learns the same value in the same call. The processes talk beside their devices,
    so no step waits for these, and the answer is the previous call's, so none waits for another.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._given, self._done = torch.zeros(1, dtype=torch.int64), None

    def __call__(self, value: int) -> int:
        """Give this process's value; return the largest of the previous call.

        A single process agrees with itself at once.
        """
        if self._group is None:
            return value
        largest = 0
        if self._done is not None:
            self._done.wait()
            largest = int(self._given)
        self._given = torch.tensor([value])
        self._done = dist.all_reduce(self._given, dist.ReduceOp.MAX, self._group, async_op=True)
        return largest

    def close(self) -> None:
        """Wait for the last call, which all processes have made."""
        if self._done is not None:
            self._done.wait()
