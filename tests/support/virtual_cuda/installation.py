"""Puts virtual CUDA in place, once in a process."""

from __future__ import annotations

import functools
import os
import sys
import threading
from typing import Any

import torch

from tests.support.virtual_cuda import products, runtime, tensors
from tests.support.virtual_cuda.mode import WatchMode
from tests.support.virtual_cuda.recorder import Recorder
from tests.support.virtual_cuda.triton_interpreter import prepare_once_a_kernel

_installed: list[Recorder] = []


def install() -> Recorder:
    """Make this process one with a GPU, before megatron is imported. Returns what records; a second call returns the same.

    TRITON_INTERPRET is set to 1, so that the Triton kernels of the package run here.
    """
    if _installed:
        return _installed[0]
    for module in (
        "megatron",
        "megatron_salt.parallel.device",
        "megatron_salt.parallel.cpu_seam",
        "megatron_salt.model.kernels",
    ):
        assert module not in sys.modules, f"virtual CUDA must be installed before {module} is imported"
    assert not torch.cuda.is_available(), "this machine has a GPU: virtual CUDA is for machines without one"
    os.environ["TRITON_INTERPRET"] = "1"
    prepare_once_a_kernel()
    recorder = Recorder()
    _installed.append(recorder)
    runtime.map_cuda(recorder)
    runtime.map_distributed(recorder)
    tensors.map_tensors(recorder)
    tensors.map_factories(recorder)
    products.map_products(recorder)
    runtime.map_seam()
    _enter_in_threads(recorder)
    WatchMode(recorder).__enter__()
    return recorder


def _enter_in_threads(recorder: Recorder) -> None:
    """A dispatch mode belongs to one thread, so every new thread enters one of its own."""
    original: Any = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    @functools.wraps(original)
    def bootstrap(self: threading.Thread) -> None:
        with WatchMode(recorder):
            original(self)

    threading.Thread._bootstrap_inner = bootstrap  # type: ignore[attr-defined]
