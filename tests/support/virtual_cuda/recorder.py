"""What virtual CUDA records: faults, waits of the host, kernels and bytes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[3]
_OURS = str(ROOT) + "/"
_HIDDEN = (str(Path(__file__).parent) + "/", _OURS + ".venv", _OURS + "megatron_salt/parallel/cpu_seam.py")
_NUM_FRAMES = 3
START = "start"
"""The label of whatever comes before the first label."""


@dataclass(frozen=True)
class Fault:
    """What CUDA or NCCL would refuse."""

    label: str
    what: str
    where: str
    """file:line of the innermost frames of this repository and of megatron-core, innermost first."""


@dataclass(frozen=True)
class Sync:
    """A place where the host waits for the device."""

    label: str
    what: str
    where: str
    """file:line as in Fault."""

    inside: frozenset[str]
    """Functions on the stack, "module.qualified name" with the last part of the module's name: "step.train_step"."""


@dataclass(frozen=True)
class Report:
    """What was recorded until `Recorder.take`."""

    faults: list[Fault]
    syncs: list[Sync]
    kernels: dict[str, dict[str, int]]
    """{label: {operator: number of kernels}}; an operator on tensors of the GPU that is no view counts as one kernel."""

    bytes: dict[str, dict[str, int]]
    """{label: {operator: bytes that its kernels read and write}}, each tensor counted whole."""

    def num_kernels(self, label: str) -> int:
        """Kernels under one label."""
        return sum(self.kernels.get(label, {}).values())

    def num_bytes(self, label: str) -> int:
        """Bytes that the kernels of one label read and write."""
        return sum(self.bytes.get(label, {}).values())

    def text(self) -> str:
        """The report for people."""
        lines = [f"faults: {len(self.faults)}"]
        lines += [
            f"  {number:5} {fault}"
            for fault, number in Counter((f"{f.label}: {f.what} at {f.where}") for f in self.faults).items()
        ]
        waits = Counter((one.label, one.what, one.where) for one in self.syncs)
        lines += [f"waits of the host: {len(self.syncs)}"]
        lines += [f"  {number:5} {label:16} {what:36} {where}" for (label, what, where), number in waits.items()]
        lines += [f"kernels, MB: {sum(map(self.num_kernels, self.kernels))}"]
        lines += [f"  {self.num_kernels(label):5} {self.num_bytes(label) / 1e6:10.2f} {label}" for label in self.kernels]
        return "\n".join(lines)


class Recorder:
    """Collects faults, waits and kernels of all threads under the current label. Inside `quiet` nothing of the thread counts."""

    def __init__(self) -> None:
        self.label = START
        self.owner = os.getpid()
        """The process that has the GPU; a forked one has not."""
        self.num_waits = 0
        """How often the host has waited so far. All work that was issued before a wait is done after it."""
        self._lock = threading.Lock()
        self._thread = _Depth()
        self._clear()

    def _clear(self) -> None:
        self._faults: list[Fault] = []
        self._syncs: list[Sync] = []
        self._kernels: dict[str, Counter[str]] = {}
        self._bytes: dict[str, Counter[str]] = {}

    def take(self) -> Report:
        """What was recorded since the last call; the label is `START` again."""
        with self._lock:
            plain = [{label: dict(counts) for label, counts in one.items()} for one in (self._kernels, self._bytes)]
            report = Report(self._faults, self._syncs, *plain)
            self._clear()
            self.label = START
        return report

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Record under this label inside the block."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside of a kernel: what this thread does there is the kernel's own business."""
        self._thread.depth += 1
        try:
            yield
        finally:
            self._thread.depth -= 1

    @property
    def is_quiet(self) -> bool:
        return self._thread.depth > 0

    def fault(self, what: str) -> None:
        """Record what CUDA would refuse."""
        if not self.is_quiet:
            self._faults.append(Fault(self.label, what, where(sys._getframe(1))))

    def sync(self, what: str) -> None:
        """Record that the host waits for the device."""
        if not self.is_quiet:
            self.num_waits += 1
            frame = sys._getframe(1)
            self._syncs.append(Sync(self.label, what, where(frame), _functions(frame)))

    def kernel(self, operator: str, num_bytes: int) -> None:
        """Record one kernel."""
        if not self.is_quiet:
            with self._lock:
                self._kernels.setdefault(self.label, Counter())[operator] += 1
                self._bytes.setdefault(self.label, Counter())[operator] += num_bytes


class _Depth(threading.local):
    depth = 0


def where(frame: FrameType | None) -> str:
    """file:line of the innermost frames that belong to the repository or to megatron-core, innermost first."""
    found: list[str] = []
    while frame is not None and len(found) < _NUM_FRAMES:
        path = frame.f_code.co_filename
        if "/megatron/core/" in path:
            found.append(f"megatron/core/{path.rpartition('/megatron/core/')[2]}:{frame.f_lineno}")
        elif path.startswith(_OURS) and not path.startswith(_HIDDEN):
            found.append(f"{path.removeprefix(_OURS)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def _functions(frame: FrameType | None) -> frozenset[str]:
    found: set[str] = set()
    while frame is not None:
        found.add(f"{frame.f_globals.get('__name__', '').rpartition('.')[2]}.{frame.f_code.co_qualname}")
        frame = frame.f_back
    return frozenset(found)
