"""What a process finds on its machine, as a value, and what has to be said to CUDA before it starts. `launch.find_hardware` looks.

Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_salt.errors import UserError

Capability = tuple[int, int]
"""CUDA's compute capability, as (9, 0)."""
Version = tuple[int, ...]
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
GIB = 2**30
"""Bytes of a GiB."""


@dataclass(frozen=True)
class Hardware:
    """One process's."""

    capability: Capability | None
    """Of its GPU; None: no GPU."""

    cuda: Version | None
    """CUDA release that torch was built for; None: a torch without CUDA."""

    transformer_engine: Version | None
    """Installed release; None: not installed."""


def order_launches(tensor: int, context: int) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS to 1 under tensor or context parallelism, unless somebody has set it. Before CUDA is initialised.

    Below compute capability 10 communication hides behind computation only where kernels start in the order of their launches, which
    takes one queue to the device (megatron-core, tensor_parallel/layers.py).
    """
    if tensor > 1 or context > 1:
        os.environ.setdefault(CONNECTIONS, "1")


def refuse_connections(tensor: int, context: int, capability: Capability | None) -> None:
    """Raise UserError where CUDA_DEVICE_MAX_CONNECTIONS is not what `order_launches` would make it, on a GPU that needs it."""
    if (tensor > 1 or context > 1) and capability is not None and capability < (10, 0) and os.environ.get(CONNECTIONS) != "1":
        raise UserError(
            f"{CONNECTIONS} is {os.environ.get(CONNECTIONS, 'unset')}: with --tensor-model-parallel-size {tensor} and "
            f"--context-parallel-size {context} it must be 1 on a GPU of compute capability {dotted(capability)}"
        )


def release(version: str) -> Version:
    """The numbers of a version's text, without what stands behind a letter or a plus: (2, 20, 2) of 2.20.2+abc."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def dotted(version: Version) -> str:
    """2.20.2 of (2, 20, 2)."""
    return ".".join(map(str, version))
