"""Record a function's GPU work once as a CUDA graph, and replay it.

A UNet's forward pass is some thousands of kernels, most of which take less time to run than to
launch; a replay launches them all at once.
"""

import functools
import gc
import logging
from collections.abc import Callable, Mapping
from typing import Generic, TypeAlias, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

Result = TypeVar("Result")
Signature: TypeAlias = tuple[tuple[str, torch.Size, torch.dtype], ...]

GraphMemory = WeakSet[torch.cuda.CUDAGraph]
"""Recordings that are never replayed simultaneously and can share their intermediate memory."""

logger = logging.getLogger(__name__)

KEPT = 4
"""The number of recordings kept of a function; the least recently used is dropped first."""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all recordings, as cuBLAS keeps a workspace for each stream it uses."""
    return torch.cuda.Stream(device)


class Replayed(Generic[Result]):
    """A function of named tensors that is recorded on its second call, and replayed from then on.

    The first call with given shapes runs normally: it compiles kernels and fills the libraries'
    caches, which cannot be recorded. After the second call the function's Python code no longer
    runs, so it may depend only on its tensors and on others at fixed addresses, and must not wait
    for the GPU. The next call of any function that shares the memory overwrites the result. On a
    CPU, or if recording fails, every call runs normally.

    Args:
        function: the function to record.
        what: the function's name in the message that recording failed.
        enabled: ``False``: never record.
        memory: the memory, shared with all functions that are given it; ``None``: new memory.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        what: str,
        *,
        enabled: bool = True,
        memory: GraphMemory | None = None,
    ) -> None:
        self.function, self.what, self.enabled = function, what, enabled
        self.memory = GraphMemory() if memory is None else memory  # an empty set is false
        self._seen: set[Signature] = set()
        self._graphs: dict[Signature, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Result]] = {}

    def __call__(self, **tensors: Tensor) -> Result:
        """Call the function, with all tensors by name."""
        key = tuple((name, t.shape, t.dtype) for name, t in tensors.items())
        if not self.enabled or any(t.device.type != "cuda" for t in tensors.values()):
            return self.function(**tensors)
        if key in self._graphs:
            graph, inputs, result = self._graphs[key] = self._graphs.pop(key)  # now the newest
            for name, tensor in tensors.items():
                inputs[name].copy_(tensor, non_blocking=True)
            graph.replay()
            return result
        if key not in self._seen:
            self._seen.add(key)
            return self._run_aside(tensors)
        return self._record(key, tensors)

    def _run_aside(self, tensors: Mapping[str, Tensor]) -> Result:
        """Run normally, but on a side stream, as PyTorch requires before recording."""
        current = torch.cuda.current_stream()
        stream = _side_stream(current.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self.function(**tensors)
        current.wait_stream(stream)
        torch.cuda.synchronize()
        return result

    def _record(self, key: Signature, tensors: Mapping[str, Tensor]) -> Result:
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        while len(self._graphs) >= KEPT:
            del self._graphs[next(iter(self._graphs))]
        gc.collect()
        torch.cuda.empty_cache()  # a graph's pool cannot reuse what the first call left cached
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            pool = next((other.pool() for other in self.memory), None)
            side = _side_stream(stream.device)
            # thread_local: other threads may call CUDA meanwhile
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                result = self.function(**inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed recording leaves its own stream current
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.enabled = False
            reason = str(error).partition("\n")[0]
            logger.warning(
                "%s cannot be recorded as a CUDA graph (%s); it runs without one, slower but with"
                " the same results.",
                *(self.what, reason),
            )
            return self.function(**tensors)
        self._graphs[key] = graph, inputs, result
        self.memory.add(graph)
        graph.replay()
        return result

    def renew(self) -> None:
        """Drop all recordings because the function has changed; the next call runs normally."""
        self._seen.clear()
        self.forget()

    def forget(self) -> None:
        """Drop all recordings and free their memory; the next call records again."""
        if self._graphs:
            self._graphs.clear()
            gc.collect()
            torch.cuda.empty_cache()
