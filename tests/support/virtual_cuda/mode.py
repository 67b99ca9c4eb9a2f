"""The dispatch mode that looks at every operator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.virtual_cuda.memory import footprint, is_pinned, on_gpu, place
from tests.support.virtual_cuda.recorder import Recorder
from tests.support.virtual_cuda.runtime import CPU_GROUPS

_MAY_MIX = frozenset(
    {"aten::copy_", "aten::_to_copy", "aten::set_.source_Tensor", "aten::set_", "aten::detach", "aten::set_data"}
)
"""Operators that take tensors of the GPU and of the CPU together."""
_TAKES_NO_NUMBER = frozenset({"aten::cat", "aten::cat.out", "aten::stack", "aten::stack.out"})
"""Operators for which a CPU tensor without dimensions is no number."""
_WAITS = {
    "aten::_local_scalar_dense": "item", "aten::nonzero": "nonzero", "aten::masked_select": "masked_select", "aten::equal": "equal",
    "aten::is_nonzero": "is_nonzero", "aten::_unique2": "unique", "aten::unique_dim": "unique", "aten::unique_consecutive": "unique",
    "aten::repeat_interleave.Tensor": "repeat_interleave", "aten::bincount": "bincount",
}  # fmt: skip
"""Operators whose result the host must know."""
_NO_KERNEL = frozenset({
    "aten::empty_like", "aten::new_empty", "aten::new_empty_strided", "aten::empty.memory_format", "aten::detach", "aten::set_data",
    "aten::set_.source_Tensor", "aten::set_.source_Storage", "aten::resize_", "aten::_local_scalar_dense",
})  # fmt: skip
_WRITES_ALONE = ("aten::copy_", "aten::fill_", "aten::zero_")
"""In-place operators that do not read what they overwrite."""


class WatchMode(TorchDispatchMode):
    """Records what operators do with tensors of the GPU, and places their results there. One object for each thread."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.name()
        if name.startswith("c10d::"):
            inspect_collective(self._recorder, name, inputs, args)
        if not any(map(on_gpu, inputs)):
            with self._recorder.quiet():
                return func(*args, **kwargs)
        inspect_devices(self._recorder, name, inputs, _written(func, args, kwargs))
        _inspect_waits(self._recorder, name, args, kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        with self._recorder.quiet():
            result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        for tensor in new:
            place(tensor, gpu=True)
        if name not in _NO_KERNEL and (new or func._schema.is_mutable):
            self._recorder.kernel(name, _num_bytes(name, func, args, inputs, outputs))
        return result


def inspect_devices(recorder: Recorder, name: str, inputs: Sequence[Tensor], written: Sequence[Tensor] = ()) -> None:
    """Record an operator that mixes devices. Raises after a fork, as CUDA does.

    A CPU tensor without dimensions passes as a number, unless the operator joins tensors or writes into it. written: those of `inputs`
    that it writes into.
    """
    if os.getpid() != recorder.owner:
        raise RuntimeError(f"{name}: Cannot re-initialize CUDA in forked subprocess")
    if name in _MAY_MIX or name.startswith("c10d::"):
        return
    no_numbers = inputs if name in _TAKES_NO_NUMBER else written
    if any(not on_gpu(tensor) for tensor in no_numbers):
        recorder.fault(f"{name} mixes devices: {_devices(inputs)}")
    elif any(tensor.dim() and not on_gpu(tensor) for tensor in inputs):
        if name.startswith(("aten::index", "aten::_index")) and on_gpu(inputs[0]):
            recorder.sync(f"{name} with an index on the CPU")
        else:
            recorder.fault(f"{name} mixes devices: {_devices(inputs)}")


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into; none of a list of tensors, each of which may lie elsewhere."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [value] if isinstance(value, Tensor) else []
    return found


def _devices(inputs: Sequence[Tensor]) -> str:
    return ", ".join(f"{'cuda' if on_gpu(tensor) else 'cpu'} {list(tensor.shape)}" for tensor in inputs)


def inspect_collective(recorder: Recorder, name: str, inputs: Sequence[Tensor], args: Sequence[Any]) -> None:
    """Record CPU tensors in a collective of NCCL, and tensors of the GPU in one of gloo."""
    if name == "c10d::barrier":
        recorder.sync("barrier")
        return
    groups = [
        dist.ProcessGroup.unbox(one)
        for one in args
        if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type())
    ]
    wants_gpu = not any(group.group_name in CPU_GROUPS for group in groups)
    if any(tensor.numel() and on_gpu(tensor) != wants_gpu for tensor in inputs):
        library = "NCCL" if wants_gpu else "gloo"
        recorder.fault(f"{name} of {library} with a tensor of the {'CPU' if wants_gpu else 'GPU'}: {_devices(inputs)}")


def _inspect_waits(recorder: Recorder, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Record an operator for which the host waits."""
    if name in _WAITS:
        recorder.sync(_WAITS[name])
    elif name in ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
        masks = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        fills = name != "aten::index.Tensor" and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        if masks and not fills:  # one number behind a mask is a masked_fill
            recorder.sync(f"{name} with a mask")
    elif name == "aten::copy_":
        target, source = args[0], args[1]
        background = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        inspect_copy(recorder, target, source, background)


def inspect_copy(recorder: Recorder, target: Tensor, source: Tensor, non_blocking: bool) -> None:
    """Record a copy between host and device for which the host waits: all but those that are non_blocking and use pinned memory."""
    to_gpu, from_gpu = on_gpu(target), on_gpu(source)
    if to_gpu == from_gpu or not source.numel():
        return
    pinned = is_pinned(source if to_gpu else target)
    if not (non_blocking and pinned):
        recorder.sync(
            f"copy to {'GPU' if to_gpu else 'CPU'}, {'pinned' if pinned else 'pageable'}{', non_blocking' * non_blocking}"
        )


def _num_bytes(name: str, func: Any, args: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Bytes that a kernel reads and writes."""
    total = sum(map(footprint, inputs)) + sum(map(footprint, outputs))
    if name.startswith(_WRITES_ALONE):
        return total - footprint(args[0])
    if any(argument.is_out for argument in func._schema.arguments):  # an `out` is an input too, and not read
        return total - sum(map(footprint, outputs))
    if not outputs and func._schema.is_mutable:  # it returns nothing; what it overwrites is an input
        written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
        total += sum(footprint(leaf) for value, writes in zip(args, written, strict=False) if writes
                     for leaf in tree_leaves(value) if isinstance(leaf, Tensor))  # fmt: skip
    return total
