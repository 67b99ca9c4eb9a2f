"""What a run says of itself: one line a logged step on stdout, every step's numbers to the sinks.

One rank, the one that holds the loss, makes its RunLog active; on the others every call returns at once. A StepRecord may
carry tensors that are still being computed: they are read in a burst at log steps, so that with --log-interval above 1
the loop need not wait for the device in between. Times are wall-clock seconds of the active rank, memory is its peak.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from torch import Tensor

from megatron_salt.config import LoggingConfig
from megatron_salt.metrics.retrying_sink import Patient
from megatron_salt.metrics.sinks import (
    Jsonl,
    TensorBoard,
    Wandb,
    look_at_jsonl,
    make_directory,
    refuse_in_the_way,
    require_package,
)
from megatron_salt.parallel.hardware import GIB

STEP_KEYS = (
    "kind",
    "time",
    "step",
    "consumed_samples",
    "loss",
    "lr",
    "grad_norm",
    "nonfinite",
    "tokens",
    "seconds",
    "tokens_per_second",
    "tflops_per_rank",
    "memory_gib",
    "phases",
)
"""Keys of every step's entry; `extra` metrics come beside them and must not repeat one."""


def peak_memory_gib() -> float:
    """Most memory this process ever used: allocated on its GPU, or without one its resident set on the CPU. GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # bytes on macOS, KiB elsewhere


def memory_in_use_gib() -> float:
    """Memory that this process uses now: allocated on its GPU, or without one its resident set. GiB."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / GIB
    return psutil.Process().memory_info().rss / GIB


class PhaseTimer:
    """Wall-clock seconds a named phase, summed between two `take`s. A phase inside another counts for the inner one alone, so
    the phases never add up to more than the time that passed. Waits for the device only where `synchronise` is given."""

    def __init__(self, synchronise: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronise = synchronise
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """{phase: seconds} since the last take."""
        assert not self._running, f"take inside phase {self._running[-1]}"
        taken, self._seconds = self._seconds, {}
        return taken

    def _charge(self) -> None:
        """Book the time since the last change of phase on the phase that was running."""
        if self._synchronise is not None:
            self._synchronise()
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


@dataclass(frozen=True)
class StepRecord:
    """One training step. Scalar tensors may still be on the device; nobody reads them before the next log step."""

    step: int
    """Steps done, this one included."""

    consumed_samples: int
    """Samples read since the start of the data, this step's included."""

    loss: Tensor | float
    """Mean over the global batch's valid tokens, nats."""

    lr: float
    grad_norm: Tensor | float
    """Global norm before clipping."""

    tokens: int
    """Input tokens of the global batch, masked ones included."""

    seconds: float
    """Wall time of the step: data, forward, backward, optimizer; without evaluations and saves."""

    teacher_flops: float = 0.0
    """The teacher's FLOPs for an input token; 0 in a step without one."""

    nonfinite: Tensor | bool = False
    """Whether the step was skipped for a non-finite gradient norm."""

    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds per phase, from PhaseTimer.take."""

    extra: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Further metrics by name, as they shall be called in the log."""


class RunLog:
    """The run's voice: `with RunLog(...) as log: log.step(...); log.evaluation(...); log.event(...)`."""

    def __init__(
        self,
        logging: LoggingConfig,
        *,
        active: bool,
        save: str | None,
        start_step: int,
        total_steps: int,
        flops_per_token: float,
        world_size: int,
        config: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the sinks where `active`. Every rank calls, so that a missing package is refused by all (UserError).

        start_step: the step resumed at, 0 for a fresh run: later entries of an interrupted run are dropped.
        save: --save, where files go that `logging` does not place. config: the run's tree, for Weights & Biases.
        """
        if logging.wandb_project is not None:
            require_package("wandb", "--wandb-project")
        self._active = active
        self._interval = logging.log_interval
        self._total_steps = total_steps
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first record, for the ETA
        self._unread: list[StepRecord] = []
        self._since_line: list[dict[str, Any]] = []
        self._num_nonfinite = 0
        self._sinks = _open_sinks(logging, save, start_step, config) if active else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write what is left; while an error is on its way, a device that no longer answers does not hide it."""
        try:
            self._drain()
        except RuntimeError:
            if error is None:
                raise
        finally:
            for sink in self._sinks:
                sink.close()

    def step(self, record: StepRecord) -> None:
        """Take note of a step; print a line at multiples of --log-interval and at the last step."""
        if not self._active:
            return
        self._unread.append(record)
        if self._first is None:
            self._first = (record.step, self._clock())
        if record.step % self._interval == 0 or record.step >= self._total_steps:
            self._drain()
            print(self._line(), flush=True)
            self._since_line.clear()

    def evaluation(
        self, step: int, name: str, loss: float, tokens: int, seconds: float, beside: Mapping[str, float] | None = None
    ) -> None:
        """Held-out `loss` (nats a token over `tokens` valid tokens) after `step`; `name` is the split's, such as "valid"; `beside`:
        further figures by name."""
        if not self._active:
            return
        perplexity = math.exp(loss) if loss < 700 else math.inf
        self._write(
            kind="eval",
            step=step,
            name=name,
            loss=loss,
            perplexity=perplexity,
            tokens=tokens,
            seconds=seconds,
            **(beside or {}),
        )
        figures = "".join(f"{name.replace('_', ' ')} {value:.4f} | " for name, value in (beside or {}).items())
        print(
            f"step {step}/{self._total_steps} | {name} loss {loss:.4f} | perplexity {perplexity:.4g} | {figures}"
            f"{tokens} tokens in {seconds:.1f} s",
            flush=True,
        )

    def event(self, step: int, message: str, facts: Mapping[str, Any] | None = None) -> None:
        """Something that is not a number a step: a line on stdout, and in the JSONL with its `facts`."""
        if not self._active:
            return
        self._write(kind="event", step=step, message=message, **(facts or {}))
        print(f"step {step}/{self._total_steps} | {message}", flush=True)

    def flush(self) -> None:
        """Hand on everything that is known, so that a crash from here on loses none of it. Call it before a checkpoint: a run that
        resumes from there does not come by these steps again."""
        if not self._active:
            return
        self._drain()
        for sink in self._sinks:
            sink.flush()

    def _write(self, **entry: Any) -> None:
        self._drain()  # entries stay in the order of their steps
        self._send({"time": time.time(), **entry})

    def _drain(self) -> None:
        """Read the records' tensors, in one go, and hand each step to the sinks."""
        records, self._unread = self._unread, []
        if not records:
            return
        memory = peak_memory_gib()
        for record in records:
            rate = record.tokens / max(record.seconds, 1e-9)
            entry: dict[str, Any] = {
                "kind": "step",
                "time": time.time(),
                "step": record.step,
                "consumed_samples": record.consumed_samples,
                "loss": float(record.loss),
                "lr": record.lr,
                "grad_norm": float(record.grad_norm),
                "nonfinite": bool(record.nonfinite),
                "tokens": record.tokens,
                "seconds": record.seconds,
                "tokens_per_second": rate,
                "tflops_per_rank": self._tflops_per_rank(rate, record.teacher_flops),
                "memory_gib": memory,
                "phases": dict(record.phases),
            }
            assert not record.extra.keys() & entry.keys(), f"extra metrics repeat {sorted(record.extra.keys() & entry.keys())}"
            entry |= {name: float(value) for name, value in record.extra.items()}
            self._num_nonfinite += entry["nonfinite"]
            self._since_line.append(entry)
            self._send(entry)

    def _send(self, entry: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(entry)

    def _line(self) -> str:
        """The steps since the last line in one line: means over them, the last one's lr and samples."""
        entries, last = self._since_line, self._since_line[-1]
        sound = [entry for entry in entries if not entry["nonfinite"]] or entries

        def mean(name: str) -> float:
            return sum(entry[name] for entry in sound) / len(sound)

        seconds = sum(entry["seconds"] for entry in entries)
        rate = sum(entry["tokens"] for entry in entries) / max(seconds, 1e-9)
        tflops = sum(entry["tflops_per_rank"] * entry["seconds"] for entry in entries) / max(seconds, 1e-9)
        parts = [
            f"step {last['step']}/{self._total_steps}",
            f"loss {mean('loss'):.4f}",
            f"lr {last['lr']:.3e}",
            f"grad norm {mean('grad_norm'):.3f}",
            f"{rate:.0f} tokens/s",
            f"{tflops:.3g} TFLOP/s a rank",
            f"{last['memory_gib']:.2f} GiB",
            f"{last['consumed_samples']} samples",
            f"{_clock_time(self._seconds_left(last))} left",
        ]
        parts += [f"{name} {mean(name):.4g}" for name in last if name not in STEP_KEYS]
        parts += [f"{self._num_nonfinite} non-finite"] if self._num_nonfinite else []
        return " | ".join(parts)

    def _tflops_per_rank(self, tokens_per_second: float, teacher_flops: float) -> float:
        """Of student and teacher: what the ranks compute, and so no measure of the student's progress where there is a teacher."""
        return tokens_per_second * (self._flops_per_token + teacher_flops) / self._world_size / 1e12

    def _seconds_left(self, last: Mapping[str, Any]) -> float:
        """By the pace since the first record, evaluations and saves included."""
        assert self._first is not None
        first_step, first_time = self._first
        done = last["step"] - first_step
        pace = (self._clock() - first_time) / done if done > 0 else last["seconds"]
        return pace * (self._total_steps - last["step"])


def look_at_logs(logging: LoggingConfig, save: str | None) -> None:
    """Raise UserError for what opening the sinks would refuse. Nothing is written."""
    jsonl, directory = jsonl_path(logging, save), tensorboard_directory(logging, save)
    if logging.wandb_project is not None:
        require_package("wandb", "--wandb-project")
    if directory is not None:
        refuse_in_the_way(directory, f"{TensorBoard.name} {directory}")
    if jsonl is not None:
        with suppress(OSError):  # a disk in trouble may be well again later: the sink tells
            look_at_jsonl(jsonl)


def _open_sinks(logging: LoggingConfig, save: str | None, start_step: int, config: Mapping[str, Any]) -> list[Patient]:
    jsonl, directory, project = jsonl_path(logging, save), tensorboard_directory(logging, save), logging.wandb_project
    if directory is not None:
        with suppress(OSError):  # the sink will say so
            make_directory(directory, TensorBoard.name)  # a path that is wrong is refused before a file is begun elsewhere
    sinks: list[Patient] = []
    if jsonl is not None:
        sinks.append(Patient(Jsonl.name, lambda step: Jsonl(jsonl, step), start_step, anew=False))
    if directory is not None:
        sinks.append(Patient(TensorBoard.name, lambda step: TensorBoard(directory, step), start_step, anew=True))
    if project is not None:
        sinks.append(Patient(Wandb.name, lambda _: Wandb(project, logging.wandb_exp_name, config), start_step, anew=False))
    return sinks


def jsonl_path(logging: LoggingConfig, save: str | None) -> Path | None:
    """Where the JSONL goes: --jsonl, or SAVE/train.jsonl; None: nowhere."""
    return Path(logging.jsonl) if logging.jsonl else Path(save) / "train.jsonl" if save else None


def tensorboard_directory(logging: LoggingConfig, save: str | None) -> Path | None:
    """Where TensorBoard files and profiles go: --tensorboard-dir, or SAVE/tensorboard; None: nowhere."""
    return Path(logging.tensorboard_dir) if logging.tensorboard_dir else Path(save) / "tensorboard" if save else None


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
