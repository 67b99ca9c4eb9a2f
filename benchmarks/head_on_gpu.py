"""kd_loss.py on a GPU: time and peak memory of the output head's loss, ours and its rivals', in one run.

Every form runs twice to warm up, which compiles it. Then all forms take turns. A time is the median of CUDA events around forward and
backward pass; memory is the peak that torch allocates in one run, minus what it held before. FLOP/s count the products that the loss
needs, whatever a form computes. A rival that is not installed, does not fit or cannot be compiled is a line, and no failure.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.head_rivals import (
    GATES,
    TOLERANCE,
    Outcome,
    Problem,
    Setting,
    Step,
    clear,
    difference,
    make_problem,
    make_step,
    run,
)
from benchmarks.results import result

GPU_RIVALS = {"kd": ("full", "chunks", "compiled"), "alone": ("plain", "mcore", "compiled_plain", "liger")} | dict.fromkeys(
    GATES, ("kd",)
)
"""Of our form with a teacher, without one, and with a teacher and a gate."""
GPU_SIZES = {"hidden_size": 2048, "teacher_hidden_size": 1024, "tokens": 8192}
GOAL_TIME, GATE_TIME = 1.0, 1.15
"""Our time over that of each rival, and with a gate over that without one, at most."""
GOAL_TFLOPS = 600.0
"""Of our form in bfloat16, on an H100 or H200."""


@dataclass
class Measured:
    """One form of the loss."""

    name: str
    step: Step
    error: float
    """`difference` from our form with the largest chunk."""
    mib: float
    """Peak memory above what was there before."""
    milliseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def compare_on_gpu(setting: Setting, ours: str, chunks: Sequence[int], rivals: Sequence[str], rounds: int) -> None:
    """Measure our form at each chunk size, and its rivals; prints a table and RESULT lines for the largest chunk."""
    problem, size = make_problem(setting), min(max(chunks), setting.tokens)
    print(f"{setting.name}, {setting.tokens} tokens, h {setting.hidden_size}, "
          f"{'no teacher' if ours == 'alone' else f'a teacher of h {setting.teacher_hidden_size}, T {setting.temperature:g}'}; "
          f"{torch.cuda.get_device_name()}", flush=True)  # fmt: skip
    reference = Outcome(*(tensor.clone() for tensor in run(problem, make_step(ours, problem, size))))
    forms = [
        prepare(f"{ours}_chunk{chunk}", make_step(ours, problem, chunk), problem, reference) for chunk in sorted(set(chunks))
    ]
    own = forms[-1]
    for name in (name for name in rivals if name in GPU_RIVALS[ours]):
        try:
            forms.append(prepare(name, make_step(name, problem, size), problem, reference))
        except Exception as error:  # whatever a rival does, ours is still measured
            print(f"  {name:16} {why_not(error)}", flush=True)
            clear(problem)
    del reference
    for _ in range(rounds):
        for form in forms:
            form.milliseconds.append(milliseconds_of(problem, form.step))
    for form in forms:
        print(f"  {form.name:16} {form.median:9.3f} ms {tflops(setting, ours, form.median):7.1f} TFLOP/s {form.mib:8.1f} MiB   "
              f"differs by {form.error:.1e}", flush=True)  # fmt: skip
    for form in forms:
        assert form.error < TOLERANCE[setting.dtype], f"{form.name} has other numbers: they differ by {form.error:.1e}"
        if form.name in rivals:
            ratio = own.median / form.median
            goal = GATE_TIME if ours in GATES else GOAL_TIME
            result(f"seconds_{setting.name}_{ours}_over_{form.name}", ratio, goal, lower_is_better=True)
    result(f"tflops_{setting.name}_{ours}", tflops(setting, ours, own.median), GOAL_TFLOPS)


def prepare(name: str, step: Step, problem: Problem, reference: Outcome) -> Measured:
    """Warm a form up, compare its numbers and take its peak memory."""
    error = difference(run(problem, step), reference)
    clear(problem)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(problem, step)
    torch.cuda.synchronize()
    return Measured(name, step, error, (torch.cuda.max_memory_allocated() - before) / 2**20)


def milliseconds_of(problem: Problem, step: Step) -> float:
    """Of one forward and backward pass on the device."""
    clear(problem)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step().backward()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def tflops(setting: Setting, ours: str, milliseconds: float) -> float:
    """10^12 FLOP/s of the products: three of the student, and the teacher's."""
    width = 3 * setting.hidden_size + (0 if ours == "alone" else setting.teacher_hidden_size)
    return 2 * setting.vocabulary_size * width * setting.tokens / milliseconds / 1e9


def why_not(error: Exception) -> str:
    """Why a rival was not measured, in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit into this GPU's memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
