"""Lets megatron-core, which says "cuda" in its source, run on the CPU. The only module that patches torch or megatron-core.

Import it before any `megatron` import: that applies the patches once, and installs `adamw.py` in place of apex's optimizer. With a
GPU (`torch.cuda.is_available()`) it patches nothing else, so megatron-core and torch run unchanged. Without a GPU the CPU answers
device="cuda" in factory calls, `.cuda()`, `Tensor.type()`, `torch.cuda.*`, autocast and the CUDA random generator, and
gradient-accumulation fusion gets a CPU version of its weight-gradient kernel. Of megatron-core's functions only two are replaced:
the random-state helpers in `tensor_parallel/random.py`, which call torch's C code for CUDA. Those that it marks for torch.compile
stay as they are written.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch

import megatron_salt.parallel.adamw  # noqa: F401  (before megatron, which imports apex's optimizer)
from megatron_salt.parallel.machine import refuse_half_engine

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
    "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip

_CPU = torch.device("cpu")


def _names_cuda(where: object) -> bool:
    return (isinstance(where, str) and where.startswith("cuda")) or (isinstance(where, torch.device) and where.type == "cuda")


def _map_factories() -> None:
    """`torch.empty(..., device="cuda")` allocates on the CPU. Pinned memory, which needs a driver, becomes plain memory."""

    def on_the_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def call(*positional: Any, **named: Any) -> torch.Tensor:
            if named:
                if _names_cuda(named.get("device")):
                    named["device"] = _CPU
                if named.get("pin_memory"):
                    named["pin_memory"] = False
            return factory(*positional, **named)

        return call

    for name in _FACTORIES:
        setattr(torch, name, on_the_cpu(getattr(torch, name)))


def _map_tensors_and_modules() -> None:
    """`.cuda()` returns the tensor or module itself. `.type()` says torch.cuda.*: megatron-core's optimizers compare this string."""
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.Tensor.record_stream = lambda self, stream: None
    original = torch.Tensor.type

    def type_of(self: torch.Tensor, *positional: Any, **named: Any) -> Any:
        answer = original(self, *positional, **named)
        if not positional and not named and self.device.type == "cpu":
            answer = answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_of


class _Stream:
    """Work on the CPU is synchronous, so all streams are equal and their work is done."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    """An event is a wall-clock time."""

    def __init__(self, *_: object, **__: object) -> None:
        self.seconds = 0.0

    def record(self, *_: object) -> None:
        self.seconds = time.perf_counter()

    def wait(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _Event) -> float:
        return (later.seconds - self.seconds) * 1e3


def _answer(value: Any) -> Callable:
    """A new function that returns `value`. torch._dynamo refuses one function under two names of torch."""
    return lambda *_, **__: value


def _map_cuda_runtime() -> None:
    stream = _Stream()
    answers = {
        "current_device": _CPU,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "ipc_collect": None,
        "reset_peak_memory_stats": None,
        "is_current_stream_capturing": False,
        "current_stream": stream,
        "default_stream": stream,
        "get_device_capability": (0, 0),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _answer(value))
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _answer(None), _answer(None)


def _map_autocast() -> None:
    """megatron-core's schedules enter torch.autocast("cuda"); its layers bind custom_fwd and custom_bwd to "cuda"."""

    def named(device_type: str) -> str:
        return "cpu" if _names_cuda(device_type) else device_type

    class Autocast(torch.amp.autocast_mode.autocast):
        def __init__(self, device_type: str, *positional: Any, **options: Any) -> None:
            super().__init__(named(device_type), *positional, **options)

    torch.autocast = torch.amp.autocast = Autocast

    def on_the_cpu(decorator: Callable) -> Callable:
        def decorate(forward: Callable | None = None, *, device_type: str, **options: Any) -> Callable:
            return decorator(forward, device_type=named(device_type), **options)

        return decorate

    torch.amp.custom_fwd, torch.amp.custom_bwd = on_the_cpu(torch.amp.custom_fwd), on_the_cpu(torch.amp.custom_bwd)


def _import_megatron_uncompiled() -> None:
    """megatron-core marks its fused functions for torch.compile, which imports torch's compiler: a third of the time that a process takes
    to start. A run on the CPU calls none of them."""

    def as_written(function: Callable) -> Callable:
        return function

    compiler, torch.compile = torch.compile, as_written
    try:
        import megatron.core.jit as jit
    finally:
        torch.compile = compiler
    jit.disable_jit_fuser()  # for modules that are imported later


def _map_generator() -> None:
    """The default CPU generator is also the CUDA generator. With a separate one every dropout would have to name it."""
    generator = torch.random.default_generator

    def get_state(*_: object, **__: object) -> torch.Tensor:
        return generator.get_state()

    def set_state(state: torch.Tensor, *_: object, **__: object) -> None:
        generator.set_state(state)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = get_state, set_state
        for name in ("manual_seed", "manual_seed_all"):
            setattr(module, name, lambda seed: generator.manual_seed(int(seed)))

    import megatron.core.tensor_parallel.random as tracker

    tracker._get_cuda_rng_state, tracker._set_cuda_rng_state = get_state, set_state
    # fork() warns when the CPU generator moved inside it; without a GPU that is the generator being forked.
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _stand_in_for_wgrad_kernel() -> None:
    """apex's `fused_weight_gradient_mlp_cuda`: main_grad += grad_output^T @ input."""

    def accumulate(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        if inputs.dtype != grad_output.dtype:  # with autocast the saved input is still float32
            inputs = inputs.to(grad_output.dtype)
        if inputs.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), inputs)
        else:
            main_grad.add_(grad_output.t() @ inputs)

    module = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate
    sys.modules.setdefault(module.__name__, module)


def _install() -> None:
    assert "megatron.core" not in sys.modules, "megatron_salt.parallel.cpu_seam must be imported before megatron"
    _map_factories()
    _map_tensors_and_modules()
    _map_cuda_runtime()
    _map_autocast()
    _stand_in_for_wgrad_kernel()


_ON_CPU = not torch.cuda.is_available()
if _ON_CPU:
    _install()
refuse_half_engine()  # megatron-core's imports would end in a traceback
if _ON_CPU:
    _import_megatron_uncompiled()
    _map_generator()
