"""Memory of this process, in GiB."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

from megatron_salt.parallel.hardware import GIB


def peak_memory_gib() -> float:
    """The most memory that this process ever used: allocated on its GPU, or without a GPU its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # bytes on macOS, KiB elsewhere


def memory_in_use_gib() -> float:
    """The memory that this process uses now: allocated on its GPU, or without a GPU its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / GIB
    return psutil.Process().memory_info().rss / GIB
