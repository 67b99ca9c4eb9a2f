"""Tensors that say where they would lie, and the calls that make them there or move them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.support.virtual_cuda.memory import footprint, is_pinned, on_gpu, pin, place
from tests.support.virtual_cuda.mode import inspect_copy
from tests.support.virtual_cuda.recorder import Recorder

_FACTORIES = (
    "arange", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand", "rand_like",
    "randint", "randn", "randn_like", "randperm", "zeros", "zeros_like",
)  # fmt: skip
_CONVERSIONS = ("tensor", "as_tensor")
_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def names_gpu(device: Any) -> bool:
    """Whether a `device` argument means the GPU: "cuda", a torch.device or a number."""
    if isinstance(device, str):
        return device.startswith("cuda")
    return device.type == "cuda" if isinstance(device, torch.device) else isinstance(device, int)


def map_tensors(recorder: Recorder) -> None:
    """Tensor.device and its kin answer by the storage; .to, .cuda, .cpu and pin_memory copy and place the copy."""
    tensor_class: Any = Tensor
    device_of, type_of, numpy_of, list_of, to = Tensor.device, Tensor.type, Tensor.numpy, Tensor.tolist, Tensor.to

    def device(self: Tensor) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu(self) else device_of.__get__(self)  # type: ignore[attr-defined]

    tensor_class.device = property(device)
    tensor_class.is_cuda = property(on_gpu)
    tensor_class.is_cpu = property(lambda self: self.device.type == "cpu")
    tensor_class.get_device = lambda self: torch.cuda.current_device() if on_gpu(self) else -1
    tensor_class.record_stream = lambda self, stream: None

    def move(self: Tensor, gpu: bool, non_blocking: bool, copy: bool = False) -> Tensor:
        if on_gpu(self) == gpu and not copy:
            return self
        with recorder.quiet():
            moved = place(self.clone(), gpu)
        if non_blocking and on_gpu(self) and not gpu:
            pin(moved)  # torch allocates the target of such a copy in pinned memory
        inspect_copy(recorder, moved, self, non_blocking)
        if on_gpu(self) and gpu:
            recorder.kernel("aten::clone", 2 * footprint(self))
        return moved

    def to_(self: Tensor, *positional: Any, non_blocking: bool = False, copy: bool = False, **named: Any) -> Tensor:
        words = list(positional)
        where = named.pop("device", None)
        if words and isinstance(words[0], (str, torch.device, int)):
            where = words.pop(0)
        elif words and isinstance(words[0], Tensor):
            where, words[0] = words[0].device, words[0].dtype
        flags = [word for word in words if isinstance(word, bool)]  # non_blocking and copy, by position
        words = [word for word in words if not isinstance(word, bool)]
        non_blocking, copy = (*flags, *(non_blocking, copy)[len(flags) :])
        gpu = on_gpu(self) if where is None else names_gpu(where)
        arrives_wide = gpu and not on_gpu(self)  # CUDA converts on the GPU
        moved = move(self, gpu, non_blocking) if arrives_wide else self
        converted = to(moved, *words, **named) if words or named else moved
        return move(converted, gpu, non_blocking, copy and converted is self)

    tensor_class.to = to_
    tensor_class.cuda = lambda self, device=None, non_blocking=False, memory_format=None: move(self, True, non_blocking)
    tensor_class.cpu = lambda self, memory_format=None: move(self, False, False)

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        assert not on_gpu(self), "cannot pin a tensor of the GPU"
        if is_pinned(self):
            return self
        with recorder.quiet():
            return pin(self.clone())

    tensor_class.pin_memory = pin_memory
    tensor_class.is_pinned = lambda self, device=None: is_pinned(self)

    def type_(self: Tensor, *positional: Any, **named: Any) -> Any:
        answer = type_of(self, *positional, **named)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and on_gpu(self) else answer

    tensor_class.type = type_

    def numpy(self: Tensor, *positional: Any, **named: Any) -> Any:
        if on_gpu(self) and not recorder.is_quiet:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."
            )
        return numpy_of(self, *positional, **named)

    tensor_class.numpy = numpy

    def tolist(self: Tensor) -> Any:
        if on_gpu(self):
            recorder.sync("tolist")
        with recorder.quiet():
            return list_of(self)

    tensor_class.tolist = tolist


def map_factories(recorder: Recorder) -> None:
    """`torch.empty(..., device="cuda")` allocates on the CPU and places the result; so do the other factories."""
    module: Any = torch
    for name in _FACTORIES:
        setattr(module, name, _factory(getattr(torch, name), name, recorder))
    for name in _CONVERSIONS:
        setattr(module, name, _conversion(getattr(torch, name), name, recorder))
    for name in _METHODS:
        setattr(Tensor, name, _factory(getattr(Tensor, name), name, recorder))


def _factory(make: Callable[..., Tensor], name: str, recorder: Recorder) -> Callable[..., Tensor]:
    """A factory; without `device`, one that is like a tensor follows that tensor."""
    is_like = name.endswith("_like") or name.startswith("new_")

    @functools.wraps(make)
    def call(*positional: Any, **named: Any) -> Tensor:
        device, pinned = named.pop("device", None), named.pop("pin_memory", False)
        gpu = (is_like and on_gpu(positional[0] if positional else named["input"])) if device is None else names_gpu(device)
        if device is not None and not gpu:
            named["device"] = device
        with recorder.quiet():
            made = make(*positional, **named)
        if isinstance(device, (str, torch.device)) and torch.device(device).type == "meta":
            return made
        place(made, gpu)
        if gpu and "empty" not in name:
            recorder.kernel(f"aten::{name}", footprint(made))
        return pin(made) if pinned else made

    return call


def _conversion(convert: Callable[..., Tensor], name: str, recorder: Recorder) -> Callable[..., Tensor]:
    """torch.tensor and torch.as_tensor: numbers come from pageable memory, and each number that is a tensor of the GPU is read."""

    @functools.wraps(convert)
    def call(data: Any, *positional: Any, **named: Any) -> Tensor:
        device, pinned = named.pop("device", None), named.pop("pin_memory", False)
        from_gpu = isinstance(data, Tensor) and on_gpu(data)
        gpu = from_gpu if device is None else names_gpu(device)
        if device is not None and not gpu:
            named["device"] = device
        if name == "as_tensor" and isinstance(data, Tensor):
            made = convert(data, *positional, **named)
            return made.to(torch.device("cuda") if gpu else torch.device("cpu"))
        for leaf in () if from_gpu else tree_leaves(data):
            if isinstance(leaf, Tensor) and on_gpu(leaf):
                recorder.sync(f"item, by torch.{name} of tensors")
        made = convert(data, *positional, **named)
        if gpu and not from_gpu and made.numel():
            recorder.sync(f"copy to GPU, pageable, by torch.{name}")
        place(made, gpu)
        return pin(made) if pinned else made

    return call
