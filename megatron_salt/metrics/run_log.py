"""The log of a run: one line a logged step on stdout, and every step's numbers in the sinks.

One rank, the one that holds the loss, makes its RunLog active; on the others every call returns at once. A StepRecord may
carry tensors that are still being computed. They are read together at log steps, so with --log-interval above 1 the loop does not wait
for the device in between. Times are wall-clock seconds of the active rank, and of its device for phases (phases.py). Memory is its peak.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from megatron_salt.config import LoggingConfig
from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.metrics.memory import peak_memory_gib
from megatron_salt.metrics.run_sinks import open_sinks, require_packages

STEP_KEYS = (
    "kind", "time", "step", "consumed_samples", "loss", "lr", "grad_norm", "nonfinite", "tokens", "seconds", "tokens_per_second",
    "tflops_per_rank", "student_flops", "teacher_flops", "memory_gib", "phases",
)  # fmt: skip
"""Keys of every step's entry. Metrics in `extra` stand beside them and must not repeat one. tflops_per_rank: of student and teacher.
student_flops, teacher_flops: in all steps of the run, this one included, over all ranks; without evaluations and scoring."""

MFU = "mfu"
"""Model FLOP/s utilization of the student: its FLOP/s / the device's peak in the run's precision. Absent where no peak is known."""


@dataclass(frozen=True, kw_only=True)
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

    step_teacher_flops: float = 0.0
    """FLOPs of the teacher in this step, over all ranks; 0 in a step without a teacher."""

    teacher_flops: float | None = 0.0
    """FLOPs of the teacher in all steps, this one included; None: unknown."""

    nonfinite: Tensor | bool = False
    """Whether the step was skipped because its gradient norm was not finite."""

    phases: Callable[[], Mapping[str, float]] = dict
    """Gives the seconds per phase, see PhaseTimer.take; called at log steps."""

    extra: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Further metrics, by their names in the log."""


class RunLog:
    """Writes the log: `with RunLog(...) as log: log.step(...); log.evaluation(...); log.event(...)`."""

    def __init__(
        self,
        logging: LoggingConfig,
        *,
        active: bool,
        save: str | None,
        start_step: int,
        total_steps: int,
        flops_per_token: float,
        seq_length: int,
        world_size: int,
        peak_tflops: float | None = None,
        config: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the sinks where `active`. Every rank calls, so that all refuse a missing package (UserError).

        start_step: the step resumed at, 0 for a fresh run; later entries of an interrupted run are dropped.
        flops_per_token: of the student. peak_tflops: of one rank's device, dense, in the run's precision; None: unknown, so no MFU.
        save: --save, the directory of files that `logging` does not place. config: the whole configuration, for Weights & Biases.
        """
        require_packages(logging)
        self._active = active
        self._interval = logging.log_interval
        self._total_steps = total_steps
        self._flops_per_token = flops_per_token
        self._seq_length = seq_length
        self._world_size = world_size
        self._peak_tflops = peak_tflops
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first record, for the ETA
        self._unread: list[StepRecord] = []
        self._since_line: list[dict[str, Any]] = []
        self._num_nonfinite = 0
        self._begun, self._task_seconds = clock(), 0.0
        self._sinks = open_sinks(logging, save, start_step, config) if active else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write what is left. An error that is already raised is not hidden by a device that no longer answers."""
        try:
            self._drain()
        except RuntimeError:
            if error is None:
                raise
        finally:
            for sink in self._sinks:
                sink.close()

    def step(self, record: StepRecord) -> None:
        """Record a step; print a line at multiples of --log-interval and at the last step."""
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
        """Record and print an evaluation after `step`: its mean `loss` in nats over `tokens` valid tokens, and its `seconds`.

        name: of the set, "valid" or "valid/NAME". beside: further figures by name.
        """
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
        figures = "".join(f"{key.replace('_', ' ')} {value:.4f} | " for key, value in (beside or {}).items())
        print(
            f"step {step}/{self._total_steps} | {name} loss {loss:.4f} | perplexity {perplexity:.4g} | {figures}"
            f"{tokens} tokens in {seconds:.1f} s",
            flush=True,
        )

    def task(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Record and print a likelihood task after `step`, and what all tasks have cost since the log began.

        name: of the task. result: {"metrics": {name: {"value", "stderr"}}, "examples", "cut", "seconds"}.
        """
        if not self._active:
            return
        self._task_seconds += result["seconds"]
        share = min(1.0, self._task_seconds / max(self._clock() - self._begun, 1e-9))
        metrics = result["metrics"]
        values = {key: figure["value"] for key, figure in metrics.items()}
        errors = {f"{key}_stderr": figure["stderr"] for key, figure in metrics.items()}
        facts = {key: result[key] for key in ("examples", "cut", "seconds")}
        self._write(kind="task", step=step, name=name, **values, **errors, **facts, share_of_time=share)
        shown = "".join(
            f"{key.replace('_', ' ')} {figure_text(figure['value'])} ± {figure_text(figure['stderr'])} | "
            for key, figure in metrics.items()
        )
        cut = f", {result['cut']} contexts cut" if result["cut"] else ""
        print(
            f"step {step}/{self._total_steps} | task {name} | {shown}{result['examples']} examples{cut} in {result['seconds']:.1f} s; "
            f"tasks take {share:.1%} of the time",
            flush=True,
        )

    def event(self, step: int, message: str, facts: Mapping[str, Any] | None = None) -> None:
        """Record something that is no number of a step: a line on stdout, and an entry of the sinks with its `facts`."""
        if not self._active:
            return
        self._write(kind="event", step=step, message=message, **(facts or {}))
        print(f"step {step}/{self._total_steps} | {message}", flush=True)

    def flush(self) -> None:
        """Write everything that is known, so that a crash after this loses none of it.

        Call it before a checkpoint: a run that resumes from there does not repeat these steps.
        """
        if not self._active:
            return
        self._drain()
        for sink in self._sinks:
            sink.flush()

    def _write(self, **entry: Any) -> None:
        self._drain()  # entries stay in the order of their steps
        self._send({"time": time.time(), **entry})

    def _drain(self) -> None:
        """Read the tensors of all records together, and hand each step to the sinks."""
        records, self._unread = self._unread, []
        if not records:
            return
        memory = peak_memory_gib()
        numbers = _read([[record.loss, record.grad_norm, record.nonfinite, *record.extra.values()] for record in records])
        for record, (loss, grad_norm, nonfinite, *extra) in zip(records, numbers, strict=True):
            rate = record.tokens / max(record.seconds, 1e-9)
            entry: dict[str, Any] = {
                "kind": "step",
                "time": time.time(),
                "step": record.step,
                "consumed_samples": record.consumed_samples,
                "loss": loss,
                "lr": record.lr,
                "grad_norm": grad_norm,
                "nonfinite": bool(nonfinite),
                "tokens": record.tokens,
                "seconds": record.seconds,
                "tokens_per_second": rate,
                "tflops_per_rank": self._tflops_per_rank(rate, record.step_teacher_flops / record.tokens),
                "student_flops": self._flops_per_token * self._seq_length * record.consumed_samples,
                "teacher_flops": record.teacher_flops,
                "memory_gib": memory,
                "phases": dict(record.phases()),
            }
            assert not record.extra.keys() & entry.keys(), f"extra metrics repeat {sorted(record.extra.keys() & entry.keys())}"
            if self._peak_tflops is not None:
                entry[MFU] = self._tflops_per_rank(rate, 0.0) / self._peak_tflops
            entry |= dict(zip(record.extra, extra, strict=True))
            self._num_nonfinite += entry["nonfinite"]
            self._since_line.append(entry)
            self._send(entry)

    def _send(self, entry: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(entry)

    def _line(self) -> str:
        """One line for the steps since the last line: means over them, and learning rate and samples of the last one."""
        entries, last = self._since_line, self._since_line[-1]
        sound = [entry for entry in entries if not entry["nonfinite"]] or entries

        def mean(name: str) -> float:
            return sum(entry[name] for entry in sound) / len(sound)

        seconds = sum(entry["seconds"] for entry in entries)
        rate = sum(entry["tokens"] for entry in entries) / max(seconds, 1e-9)
        tflops = sum(entry["tflops_per_rank"] * entry["seconds"] for entry in entries) / max(seconds, 1e-9)
        taught = any(entry["tflops_per_rank"] > self._tflops_per_rank(entry["tokens_per_second"], 0.0) for entry in entries)
        parts = [
            f"step {last['step']}/{self._total_steps}",
            f"loss {mean('loss'):.4f}",
            f"lr {last['lr']:.3e}",
            f"grad norm {mean('grad_norm'):.3f}",
            f"{rate:.0f} tokens/s",
            *([] if self._peak_tflops is None else [f"MFU {self._tflops_per_rank(rate, 0.0) / self._peak_tflops:.1%}"]),
            f"{tflops:.3g} TFLOP/s a rank{' with the teacher' if taught else ''}",
            f"{last['memory_gib']:.2f} GiB",
            f"{last['consumed_samples']} samples",
            f"{_clock_time(self._seconds_left(last))} left",
        ]
        parts += [f"{name} {mean(name):.4g}" for name in last if name not in (*STEP_KEYS, MFU)]
        parts += [f"{self._num_nonfinite} non-finite"] if self._num_nonfinite else []
        return " | ".join(parts)

    def _tflops_per_rank(self, tokens_per_second: float, teacher_flops: float) -> float:
        """TFLOP/s that a rank computes for student and teacher; with a teacher, no measure of the student's speed."""
        return tokens_per_second * (self._flops_per_token + teacher_flops) / self._world_size / 1e12

    def _seconds_left(self, last: Mapping[str, Any]) -> float:
        """Seconds to the last step, at the pace since the first record, evaluations and saves included."""
        assert self._first is not None
        first_step, first_time = self._first
        done = last["step"] - first_step
        pace = (self._clock() - first_time) / done if done > 0 else last["seconds"]
        return pace * (self._total_steps - last["step"])


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _read(rows: list[list[Tensor | float]]) -> list[list[float]]:
    """The numbers of tensors, which have one element each. All tensors are read together: the host waits once for the device."""
    tensors = [value.detach().double().view(()) for row in rows for value in row if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [[next(numbers) if isinstance(value, Tensor) else float(value) for value in row] for row in rows]
