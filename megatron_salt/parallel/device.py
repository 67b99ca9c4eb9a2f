"""The device of this process, and how a CPU tensor gets there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

SENDS_COPY = torch.cuda.is_available()
"""Whether a tensor may be freed as soon as its send is issued. With gloo it may not: megatron-core 0.16.1's interleaved schedule would
free the output of a pipeline stage before it is sent, and losses would be wrong without an error."""


def current_device() -> torch.device:
    """The device of this process: its current CUDA device, or the CPU without a GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str | None:
    """Name of the GPU of this process; None on a CPU."""
    device = current_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a CPU tensor to `current_device()`.

    A copy to a GPU goes through pinned memory and is asynchronous; torch keeps the pinned buffer until the copy is done.
    """
    return tensor.pin_memory().to(current_device(), non_blocking=True) if torch.cuda.is_available() else tensor


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Undefined memory on the host, from which `to_device` copies without another copy: pinned where there is a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def begin_to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """Begin to copy a tensor to the host. -> (the copy, contiguous; a function that waits until it is whole, from any thread).

    Nothing here waits for the device.
    """
    copy = host_buffer(tuple(tensor.shape), tensor.dtype).copy_(tensor, non_blocking=True)
    if not tensor.is_cuda:
        return copy, _nothing
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, partial(reach, arrived)


def _nothing() -> None:
    """There is nothing to wait for."""


def reach(event: torch.cuda.Event) -> None:
    """Wait until the device has reached the event; an event that it has passed costs no wait."""
    if not event.query():
        event.synchronize()
