"""Recording a function's GPU work once as a CUDA graph, and replaying it.

A UNet's forward pass is some thousands of kernels, most of them shorter than their launch takes;
a replay launches them all at once.
"""

import functools
import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

Result = TypeVar("Result")
Signature = tuple[tuple[str, torch.Size, torch.dtype], ...]

logger = logging.getLogger(__name__)

KEPT = 4
"""How many recordings of a function are kept: those used last."""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps a workspace for each that it ever was used on."""
    return torch.cuda.Stream(device)


class GraphMemory:
    """Memory for the intermediate tensors of recordings that are never replayed at once."""

    def __init__(self) -> None:
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    @property
    def pool(self) -> Any:
        """The pool of the recordings that are left; ``None``: a new one."""
        return next((graph.pool() for graph in self._graphs), None)

    def add(self, graph: torch.cuda.CUDAGraph) -> None:
        """Keep the pool for as long as this recording is there."""
        self._graphs.add(graph)


class Replayed(Generic[Result]):
    """A function of named tensors that is recorded on its second call, and replayed from then on.

    The first call of given shapes runs as it is: it compiles kernels and fills the libraries'
    caches, which cannot be recorded. From the second call on, the function's Python code is not
    run: it must be a function of its tensors and of others at fixed addresses alone, must not wait
    for the GPU, and its result is overwritten by the next call of any function with the same
    memory. On a CPU, and where recording fails, every call runs as it is.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        what: str,
        *,
        enabled: bool = True,
        memory: GraphMemory | None = None,
    ) -> None:
        self.function = function
        self.what = what
        """What is recorded, for the message where that fails."""
        self.enabled = enabled
        self.memory = memory or GraphMemory()
        self._seen: set[Signature] = set()
        self._graphs: dict[Signature, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Result]] = {}

    def __call__(self, **tensors: Tensor) -> Result:
        """Call the function, all tensors by name."""
        key = tuple((name, t.shape, t.dtype) for name, t in tensors.items())
        if not self.enabled or any(t.device.type != "cuda" for t in tensors.values()):
            return self.function(**tensors)
        if key in self._graphs:
            graph, inputs, result = self._graphs[key] = self._graphs.pop(key)
            for name, tensor in tensors.items():
                inputs[name].copy_(tensor, non_blocking=True)
            graph.replay()
            return result
        if key not in self._seen:
            self._seen.add(key)
            return self._aside(tensors)
        return self._record(key, tensors)

    def _aside(self, tensors: Mapping[str, Tensor]) -> Result:
        """Run as it is, beside the usual stream as PyTorch asks for before recording."""
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
        torch.cuda.empty_cache()  # the memory of the first call is free for the graph
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            side = _side_stream(stream.device)
            recording = torch.cuda.graph(
                graph, self.memory.pool, side, capture_error_mode="thread_local"
            )
            with recording:
                result = self.function(**inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a recording that fails stays on its own
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.enabled = False
            reason = str(error).partition("\n")[0]
            logger.warning(
                "%s cannot be recorded as a CUDA graph (%s), and runs without one: slower, with the"
                " same results.",
                self.what,
                reason,
            )
            return self.function(**tensors)
        self._graphs[key] = graph, inputs, result
        self.memory.add(graph)
        graph.replay()
        return result

    def renew(self) -> None:
        """Forget, where the function itself has changed: the next call runs as it is again."""
        self._seen.clear()
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded and free its memory; the next calls record again."""
        if self._graphs:
            self._graphs.clear()
            gc.collect()
            torch.cuda.empty_cache()
