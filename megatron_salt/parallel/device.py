"""The device that this process computes on, and tensors on their way to it."""

from __future__ import annotations

import torch

SENDS_COPY = torch.cuda.is_available()
"""Whether a tensor may be freed once its send was issued. On gloo it may not: megatron-core 0.16.1's interleaved schedule frees
a pipeline stage's output while it is still being sent, and the losses are silently wrong."""


def current_device() -> torch.device:
    """The device that this process computes on: its current CUDA device, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a CPU tensor to `current_device()`.

    A copy to a GPU goes through pinned memory and is asynchronous; torch keeps the pinned buffer until the copy is done.
    """
    return tensor.pin_memory().to(current_device(), non_blocking=True) if torch.cuda.is_available() else tensor
