"""The memory and work of a computation, counted on tensors without values.

On the meta device PyTorch computes only shapes, so a step of a model of any size runs within
seconds on any machine, while the memory, arithmetic and traffic of each operation are counted.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")

GIB = 2**30

DRIVER_BYTES = 0.5 * GIB
"""The part of a card's memory that the driver and CUDA's context take."""

WORKSPACE_BYTES = 0.25 * GIB
"""The part of PyTorch's memory that cuBLAS and cuDNN take."""

FRAGMENTATION = 0.03
"""The share of memory that lies idle between allocations."""

ALLOCATION_BYTES = 512
"""The unit to which PyTorch's CUDA allocator rounds sizes up."""


def reserved(allocated: float) -> int:
    """Estimate the bytes that PyTorch reserves on a GPU for a peak of allocated bytes."""
    return int(allocated * (1 + FRAGMENTATION) + WORKSPACE_BYTES)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Add up the bytes of tensors, counting a repeated one once."""
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    return sum(tensor.nbytes for tensor in distinct)


class Tally(TorchDispatchMode):
    """A context that counts peak memory, floating-point operations and bytes moved within it.

    Args:
        resident: tensors that existed before, such as weights, and are not counted.
    """

    def __init__(self, resident: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.peak_bytes = 0
        """The most bytes that were allocated at once."""
        self.flops = 0
        """Floating-point operations of matrix products and convolutions."""
        self.moved_bytes = 0
        """The bytes that all operations together read and write."""
        self.operations = 0
        """The number of operations that do more than view a tensor."""
        self._live_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in resident}
        self._stand_ins = _StandIns()

    def __enter__(self) -> "Tally":
        self._stand_ins.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stand_ins.__exit__(*error)

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation on shapes, and count it."""
        kwargs = kwargs or {}
        result = _run(operation, args, kwargs)
        count = flop_registry.get(operation.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [self._allocate(tensor) for tensor in results]
        if any(new) or not results:  # a view moves nothing
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved_bytes += sum(tensor.nbytes for tensor in inputs + results)
            self.operations += 1
        return result

    def _allocate(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._known.add(key)
        self._live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._free, key, size)
        return True

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live_bytes -= size


def forward_bytes(
    forward: Callable[..., object], inputs: Mapping[str, Tensor], resident: Iterable[Tensor]
) -> int:
    """Count the most bytes that a forward pass without gradients allocates, besides its inputs."""
    return tally_forward(forward, inputs, resident).peak_bytes


def tally_forward(
    forward: Callable[..., object], inputs: Mapping[str, Tensor], resident: Iterable[Tensor]
) -> Tally:
    """Count the memory and operations of a forward pass without gradients, besides its inputs."""
    with torch.no_grad(), Tally([*resident, *inputs.values()]) as tally:
        forward(**inputs)
    return tally


@dataclass(frozen=True)
class _Blank:
    """All there is of a tensor without values."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_Blank":
        """Describe a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def make(self) -> Tensor:
        """Make a new tensor that is described so."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=META)


_RESULTS: dict[Hashable, Any] = {}
"""Results of operations on the meta device, with a :class:`_Blank` for each tensor, by input."""


def _run(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation; on the meta device, one that makes new tensors only once for each shape.

    There most operations are written in Python, and take a hundred times as long as looking up
    what they gave the last time. A UNet is made of few different blocks.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not (_makes_new_tensors(operation) and all(each.device == META for each in tensors)):
        return operation(*args, **kwargs)
    key = (operation, _describe(args), _describe(tuple(sorted(kwargs.items()))))
    if key in _RESULTS:
        return tree_map(
            lambda leaf: leaf.make() if isinstance(leaf, _Blank) else leaf, _RESULTS[key]
        )
    result = operation(*args, **kwargs)
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    given = {tensor.untyped_storage()._cdata for tensor in tensors}
    if all(_is_new(tensor, given) for tensor in made):
        _RESULTS[key] = tree_map(
            lambda leaf: _Blank.of(leaf) if isinstance(leaf, Tensor) else leaf, result
        )
    return result


def _makes_new_tensors(operation: Any) -> bool:
    """Tell whether an operation neither changes its inputs nor returns views of them."""
    schema = operation._schema
    return not schema.is_mutable and all(each.alias_info is None for each in schema.returns)


def _is_new(tensor: Tensor, given: set[int]) -> bool:
    """Tell whether a result has a storage of its own size, and not that of an input.

    Some operations return an input that needs no change.
    """
    storage = tensor.untyped_storage()
    return (
        tensor.device == META and storage._cdata not in given and storage.nbytes() == tensor.nbytes
    )


def _describe(value: Any) -> Hashable:
    """Describe an operation's arguments: of tensors the shapes, of all others the values."""
    if isinstance(value, Tensor):
        return _Blank.of(value)
    if isinstance(value, tuple | list):
        return tuple(map(_describe, value))
    if isinstance(value, torch.Generator):
        return torch.Generator  # it changes no shape
    return type(value), value  # 1 and 1.0 are the same key


class _StandIns(TorchFunctionMode):
    """Replacements for functions that must run differently on tensors without values.

    On the meta device, attention would be computed by its formula, with all its weights in memory.
    PEFT's LoHa and LoKr draw a number for each layer, which must not advance the random state that
    training uses.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.scaled_dot_product_attention and args[0].device == META:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        own = {"generator": torch.Generator()} if function is torch.rand else {}
        return function(*args, **(kwargs or {}), **own)
