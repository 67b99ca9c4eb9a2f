"""Memory of this process, in GiB."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

from megatron_salt.parallel.hardware import GIB


def peak_memory_gib() -> float:
    """The most memory that this process used: allocated on its GPU since `forget_peak_memory`, or without a GPU its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # bytes on macOS, KiB elsewhere


def forget_peak_memory() -> None:
    """On a GPU, let `peak_memory_gib` count from now on. The peak of a resident set cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_in_use_gib() -> float:
    """The memory that this process uses now: allocated on its GPU, or without a GPU its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / GIB
    return psutil.Process().memory_info().rss / GIB
