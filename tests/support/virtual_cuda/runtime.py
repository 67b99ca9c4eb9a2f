"""torch.cuda and torch.distributed as a process with a GPU sees them. The machine: 8 virtual H200."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.support.virtual_cuda.memory import MEMORY
from tests.support.virtual_cuda.recorder import Recorder

NUM_GPUS = 8
PROPERTIES = SimpleNamespace(
    name="virtual H200", major=9, minor=0, total_memory=141 << 30, multi_processor_count=132, L2_cache_size=60 << 20,
    max_threads_per_multi_processor=2048, warp_size=32, is_integrated=False, uuid="GPU-virtual", gcnArchName="",
)  # fmt: skip
CPU_GROUPS: set[str] = set()
"""Names of the process groups that were made for CPU tensors, with backend gloo. All others are NCCL's."""


class Stream:
    """A stream. Work is synchronous here, so all are equal; waiting for one is recorded."""

    recorder: Recorder
    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.device_index, self.stream_id = self.device.index, 0

    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None:
        self.recorder.sync("Stream.synchronize")

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class Event:
    """An event is a wall-clock time. It has happened as soon as the host has waited for the device, or has asked."""

    recorder: Recorder

    def __init__(self, enable_timing: bool = False, *_: object, **__: object) -> None:
        self._timed, self._seconds = enable_timing, float("nan")
        self._waits: int | None = None
        """Waits of the host when this was recorded; None: it has happened."""

    def _has_happened(self) -> bool:
        return self._waits is None or self.recorder.num_waits > self._waits

    def record(self, stream: object = None) -> None:
        self._seconds, self._waits = time.perf_counter(), self.recorder.num_waits

    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None:
        if not self._has_happened():
            self.recorder.sync("Event.synchronize")

    def query(self) -> bool:
        self._waits = None
        return True

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds. Raises as torch does where an event has no time, or has not happened yet."""
        if not (self._timed and later._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (self._has_happened() and later._has_happened()):
            raise RuntimeError("CUDA error: device not ready")
        return (later._seconds - self._seconds) * 1e3


class Generator(torch.Generator):
    """A generator of the CPU, for whatever device."""

    def __new__(cls, device: object = "cpu") -> Generator:
        return super().__new__(cls)


def map_cuda(recorder: Recorder) -> None:
    """torch.cuda.*"""
    cuda: Any = torch.cuda
    device = SimpleNamespace(index=0)
    Stream.recorder = Event.recorder = recorder

    def set_device(index: int | torch.device) -> None:
        device.index = index if isinstance(index, int) else (index.index or 0)

    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.device_count = lambda: NUM_GPUS
    cuda.current_device = lambda: device.index
    cuda.set_device = set_device
    cuda.synchronize = lambda *_: recorder.sync("torch.cuda.synchronize")
    cuda.get_device_capability = lambda *_: (PROPERTIES.major, PROPERTIES.minor)
    cuda.get_device_name = lambda *_: PROPERTIES.name
    cuda.get_device_properties = lambda *_: PROPERTIES
    cuda.nccl.version = lambda: (2, 27, 0)
    cuda._lazy_init = lambda: None
    for name in ("empty_cache", "ipc_collect"):
        setattr(cuda, name, _answer(None))
    cuda.is_current_stream_capturing = _answer(False)
    cuda.memory_allocated = cuda.memory_reserved = lambda *_: MEMORY.allocated
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_: MEMORY.peak
    cuda.reset_peak_memory_stats = lambda *_: MEMORY.reset_peak()
    cuda.mem_get_info = lambda *_: (PROPERTIES.total_memory - MEMORY.allocated, PROPERTIES.total_memory)
    cuda.memory_stats = lambda *_: {"allocated_bytes.all.current": MEMORY.allocated, "allocated_bytes.all.peak": MEMORY.peak}
    stream = Stream()
    cuda.current_stream = cuda.default_stream = _answer(stream)
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.Stream, cuda.Event = Stream, Event
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _answer(None), _answer(None)
    torch.Generator = Generator  # type: ignore[misc]
    torch.version.cuda = "13.0"  # type: ignore[assignment]


def _answer(value: Any) -> Callable[..., Any]:
    """A new function that returns `value`. torch._dynamo refuses one function under two names of torch."""
    return lambda *_, **__: value


def map_seam() -> None:
    """What `cpu_seam.py` does for a CPU and this needs too: autocast by the name "cuda", and one random generator for both devices."""
    from megatron_salt.parallel import cpu_seam

    cpu_seam._map_autocast()
    cpu_seam._map_generator()


def map_distributed(recorder: Recorder) -> None:
    """NCCL is gloo. Objects travel through the GPU, as with NCCL; a sent tensor may be freed at once."""
    _map_wait(recorder)
    initialise, new_group, send = dist.init_process_group, dist.new_group, dist.isend
    names = (dist, distributed_c10d)

    def init_process_group(backend: str | None = None, **named: Any) -> None:
        named.pop("device_id", None)
        CPU_GROUPS.clear()
        initialise("gloo", **named)
        if backend == "gloo":
            CPU_GROUPS.add(dist.group.WORLD.group_name)

    def new_group_(*positional: Any, **named: Any) -> Any:
        assert len(positional) <= 2, "ranks and timeout; the rest by name"
        backend = named.pop("backend", None)
        named.pop("device_id", None)
        made = new_group(*positional, backend="gloo", **named)
        if backend == "gloo" and hasattr(made, "group_name"):
            CPU_GROUPS.add(made.group_name)
        return made

    def isend(tensor: torch.Tensor, *positional: Any, **named: Any) -> Any:
        return send(tensor.detach(), *positional, **named)  # a tensor of its own keeps the memory until the message is out

    def object_device(group: Any = None) -> str:
        world = dist.group.WORLD if group is None else group
        return "cpu" if world.group_name in CPU_GROUPS else f"cuda:{torch.cuda.current_device()}"

    for module in names:
        module.init_process_group, module.new_group, module.isend = init_process_group, new_group_, isend  # type: ignore[attr-defined]
    distributed_c10d._get_object_coll_device = object_device


def _map_wait(recorder: Recorder) -> None:
    """The host does not wait in `Work.wait` of NCCL. That of gloo may copy; that is no copy between devices."""
    work: Any = dist.Work
    original = work.wait

    def wait(self: dist.Work, *timeout: Any) -> Any:
        with recorder.quiet():
            return original(self, *timeout)

    work.wait = wait
