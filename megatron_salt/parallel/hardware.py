"""GPU, CUDA and Transformer Engine versions that a process sees (`launch.find_hardware`), and variables that libraries read at start.

Imports no torch: programs set the variables before its import.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_salt.config.parallel import Device
from megatron_salt.errors import UserError

Capability = tuple[int, int]
"""Compute capability of a GPU, such as (9, 0)."""
Version = tuple[int, ...]
VISIBLE = "CUDA_VISIBLE_DEVICES"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
COMPILE_WORKERS = "TORCHINDUCTOR_COMPILE_THREADS"
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring",),
}
"""Variables of --deterministic: the values that do, the default first. cuBLAS reads its own with its first handle, Transformer Engine in
its first attention, NCCL with its first communicator (megatron-core 0.19.2, megatron/training/determinism.py)."""
GIB = 2**30
"""Bytes of a GiB."""


@dataclass(frozen=True)
class Hardware:
    """GPU, CUDA and Transformer Engine versions that this process sees."""

    capability: Capability | None
    """Compute capability of the GPU; None: no GPU."""

    cuda: Version | None
    """CUDA release that torch was built for; None: torch was built without CUDA."""

    transformer_engine: Version | None
    """Installed release; None: not installed."""


def prepare_environment(device: Device) -> None:
    """What every program that computes sets before torch is imported. device: --device."""
    hide_gpus(device)
    bound_compile_workers()


def hide_gpus(device: Device) -> None:
    """With --device cpu, hide the GPUs from this process and its children. Call it before the first question about CUDA."""
    if device == "cpu":
        os.environ[VISIBLE] = ""


def order_launches(tensor: int, context: int) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS to 1 with tensor or context parallelism, unless it is set. Call it before CUDA is initialised.

    Below compute capability 10, communication overlaps with computation only if kernels start in the order of their launches. That needs
    a single queue to the device (megatron-core, tensor_parallel/layers.py).
    """
    if tensor > 1 or context > 1:
        os.environ.setdefault(CONNECTIONS, "1")


def bound_compile_workers() -> None:
    """Let torch compile in 4 processes a rank unless TORCHINDUCTOR_COMPILE_THREADS says otherwise. Call it before torch is imported.

    By default there are as many as cores, up to 32: with a rank a GPU that is some hundred processes a node.
    """
    os.environ.setdefault(COMPILE_WORKERS, "4")


def ask_for_determinism() -> None:
    """Set the variables of --deterministic. Call it before CUDA is initialised. Raises UserError where one has a value that does not do."""
    for name, values in DETERMINISTIC.items():
        if os.environ.setdefault(name, values[0]) not in values:
            raise UserError(f"--deterministic needs {name}={' or '.join(values)}, and it is {os.environ[name]}; unset it")


def refuse_connections(tensor: int, context: int, capability: Capability | None) -> None:
    """Raise UserError if the GPU needs CUDA_DEVICE_MAX_CONNECTIONS = 1 and it has another value, see `order_launches`."""
    if (tensor > 1 or context > 1) and capability is not None and capability < (10, 0) and os.environ.get(CONNECTIONS) != "1":
        raise UserError(
            f"{CONNECTIONS} is {os.environ.get(CONNECTIONS, 'unset')}: with --tensor-model-parallel-size {tensor} and "
            f"--context-parallel-size {context} it must be 1 on a GPU of compute capability {dotted(capability)}"
        )


def release(version: str) -> Version:
    """The leading numbers of a version: "2.20.2+abc" -> (2, 20, 2)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def dotted(version: Version) -> str:
    """(2, 20, 2) -> "2.20.2"."""
    return ".".join(map(str, version))
