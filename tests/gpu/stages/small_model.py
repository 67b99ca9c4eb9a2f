"""Stages with the tests' small model: it trains, learns from a teacher, resumes and scores as it did on a CPU.

Each of the first three has a function that computes its numbers on any device, and a stage that compares them with those in
tests/gpu/expected/.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state

from megatron_salt import pretrain
from megatron_salt.cli import run_tool
from megatron_salt.model.loss import KD_METRICS
from megatron_salt.parallel.launch import distributed
from megatron_salt.tools.score_data import ScoreConfig, score_data
from tests.gpu.stages.runner import NotHereError, Report, Setting
from tests.gpu.stages.seeded import expected, programs_with_seeded_weights, seed_weights
from tests.support import scoring, teaching
from tests.support.checkpoint_runs import DROPOUT, Run, at, start
from tests.support.program import argv, entries, write_tokens
from tests.support.rank_worker import break_cycles
from tests.support.small import Case, build_student, train_student

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS = {"fp32": 1e-4, "bf16": 5e-3}
"""Relative tolerance of losses, GPU against CPU."""
GRADIENT = {"fp32": 5e-4, "bf16": 5e-2}
"""The same of gradient norms."""
BY_LOSS = ("median", "mean", "entropy")
"""Columns of a score index in which a token's rank takes no part."""
BY_RANK = {"fp32": 0.9, "bf16": 0.7}
"""How many windows must have the recorded score in the other columns: a token that changes its rank moves the whole score."""
TAUGHT = ("loss", "ce", "kl", "teacher_ce")
EPS = 1e-6
"""Adam's. A gradient that is nothing but rounding stays small, see Case.adam_eps."""
Numbers = dict[str, Any]


@contextlib.contextmanager
def one_rank() -> Any:
    """A world of one rank in this process, which is gone afterwards. Matrix products in float32 are not rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with distributed(timedelta(minutes=2)):
        yield


def leave_mesh() -> None:
    """So that another one can be made."""
    parallel_state.destroy_model_parallel()


# ---- the numbers -----------------------------------------------------------------------------------------------------------------


def trained(dtype: str) -> Numbers:
    """Losses and gradient norms of three steps. Inside `one_rank`."""
    case = Case(dtype=DTYPES[dtype], adam_eps=EPS)
    student = build_student(case, 1)
    weights = seed_weights(student)
    curve = train_student(student, case, 3)
    leave_mesh()
    return {"weights": weights, "loss": curve.losses, "grad_norm": curve.grad_norms}


def taught(dtype: str, scratch: Path) -> Numbers:
    """Metrics and gradient norms of three steps of stage 1. Inside `one_rank`."""
    directory = scratch / f"small teacher {dtype}"
    teacher = build_student(Case(model=teaching.TEACHER), 1)
    seed_weights(teacher)
    teaching.save_teacher(teacher, directory, teaching.TEACHER, 0)
    leave_mesh()
    lesson = teaching.Lesson(Case(dtype=DTYPES[dtype], adam_eps=EPS), str(directory))
    student = build_student(lesson.case, 1)
    weights = seed_weights(student)
    told = teaching.lessons(student, teaching.admit(lesson, student), lesson, 3)
    leave_mesh()
    columns = {name: [sums[KD_METRICS.index(name)] for sums in told.sums] for name in TAUGHT}
    return {"weights": weights, "grad_norm": told.grad_norms, **columns}


PROGRAM = dict(transformer_impl="torch", untie_embeddings_and_output_weights=True, adam_eps=EPS)
PROGRAM_STEPS, PROGRAM_STAGE1 = 6, 4


def ran(dtype: str, scratch: Path) -> Numbers:
    """The programs: a teacher, a student through the switch, both from seeded weights, and the teacher's scores."""
    folder = scratch / f"programs {dtype}"
    folder.mkdir()
    data = write_tokens(folder / "words")
    flags = PROGRAM | dict(data_path=data, bf16=dtype == "bf16")
    with programs_with_seeded_weights():
        run_program(argv(**flags, train_iters=3, save=folder / "teacher"))
        run_program(argv(**flags, train_iters=PROGRAM_STEPS, kd_steps=PROGRAM_STAGE1, teacher_load=folder / "teacher",
                         save=folder / "student", num_layers=3, valid_share=0.2, eval_interval=3, eval_iters=1,
                         no_eval_at_start=True))  # fmt: skip
    words = scoring.argv(teacher_load=folder / "teacher", data_path=data, output=folder / "scores")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = run_tool(ScoreConfig, score_data, words)
    assert status == 0, said.getvalue()[-2000:]
    scores = scoring.table(folder / "scores")
    steps, evaluations = entries(folder / "student"), entries(folder / "student", "eval")
    return {
        "teacher_loss": [entry["loss"] for entry in entries(folder / "teacher")],
        "loss": [entry["loss"] for entry in steps],
        "grad_norm": [entry["grad_norm"] for entry in steps],
        "kl": [entry["kl"] for entry in steps if "kl" in entry],
        "held_out": [entry["loss"] for entry in evaluations],
        "scores": {name: [float(one) for one in column] for name, column in scores.items() if column.dtype.kind == "f"},
    }


def run_program(words: list[str]) -> str:
    """Call `pretrain.main` in this process; an AssertionError with what it printed where it does not end well. Returns stdout."""
    said, log = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(log):
        status = pretrain.main(words)
    assert status == 0, f"pretrain {' '.join(words)} ended with {status}: {(said.getvalue() + log.getvalue())[-2000:]}"
    return said.getvalue()


def record(scratch: Path) -> dict[str, Numbers]:
    """All numbers, on the CPU: the contents of tests/gpu/expected/, by file name."""
    torch.set_num_threads(1)  # so that sums keep their order
    found: dict[str, Numbers] = {"training": {}, "teaching": {}, "programs": {}}
    for dtype in DTYPES:
        with one_rank():
            found["training"][dtype] = trained(dtype)
            found["teaching"][dtype] = taught(dtype, scratch)
        found["programs"][dtype] = ran(dtype, scratch)
    return found


# ---- the stages ------------------------------------------------------------------------------------------------------------------


def compare(report: Report, dtype: str, found: Numbers, recorded: Numbers) -> None:
    """Every list of numbers with the recorded one."""
    for name, numbers in found.items():
        if name == "weights":
            report.require(numbers == recorded[name], "the seeded weights are not those of the recorded numbers")
        elif name == "scores":
            for column, values in numbers.items():
                wanted = recorded[name][column]
                near = [
                    abs(one - other) <= LOSS[dtype] * max(1.0, abs(other)) for one, other in zip(values, wanted, strict=True)
                ]
                share, limit = sum(near) / len(near), 1.0 if column in BY_LOSS else BY_RANK[dtype]
                report.require(
                    share >= limit, f"{dtype} scores {column}: {share:.0%} are as recorded, and {limit:.0%} should be"
                )
        else:
            tolerance = (GRADIENT if name == "grad_norm" else LOSS)[dtype]
            # A KL divergence is a small difference of two losses: its error is theirs.
            report.compare(
                f"{dtype} {name}", numbers, recorded[name], tolerance, absolute=LOSS[dtype] * 10 if name == "kl" else 0.0
            )


def training(setting: Setting, report: Report) -> None:
    """Three steps are those of the CPU."""
    for dtype, recorded in expected("training").items():
        with one_rank():
            compare(report, dtype, trained(dtype), recorded)


def teaching_stage(setting: Setting, report: Report) -> None:
    """Three steps with a teacher are those of the CPU."""
    for dtype, recorded in expected("teaching").items():
        with one_rank():
            compare(report, dtype, taught(dtype, setting.scratch), recorded)


def programs(setting: Setting, report: Report) -> None:
    """pretrain and score_data give the numbers of the CPU, through the switch, with evaluations."""
    for dtype, recorded in expected("programs").items():
        compare(report, dtype, ran(dtype, setting.scratch), recorded)


def resuming(setting: Setting, report: Report) -> None:
    """A resumed run continues with the losses of an uninterrupted one; saved at once and by a forked writer."""
    for async_save in (False, True):
        uninterrupted, resumed = resumed_losses(setting.scratch / f"resumed, async {async_save}", async_save)
        report.compare(f"losses after a save, async {async_save}", resumed, uninterrupted, 1e-6)
        report.note(**{f"same bits, async {async_save}": resumed == uninterrupted})


def resumed_losses(directory: Path, async_save: bool) -> tuple[list[float], list[float]]:
    """Losses of steps 3 and 4 without and with a stop after step 2, in bfloat16 with dropout."""
    run = Run(save=str(directory), model=DROPOUT, dtype=torch.bfloat16, flags={"async_save": async_save})
    with one_rank():
        student, checkpointer, _ = start(run, 1)
        train_student(student, run.case, 2)
        checkpointer.save(at(2))
        checkpointer.finish()
        uninterrupted = train_student(student, run.case, 2, start=2).losses
        leave_mesh()
        student, _, progress = start(replace(run, load=str(directory)), 1)
        assert progress is not None and progress.step == 2
        resumed = train_student(student, run.case, 2, start=2).losses
        leave_mesh()
    return uninterrupted, resumed


def freeing(setting: Setting, report: Report) -> None:
    """A freed teacher leaves the device's memory as it was."""
    if setting.device != "cuda":
        raise NotHereError("the memory of a GPU is what it measures")
    with one_rank():
        without, with_teacher, after, size = memory_of_a_teacher(setting.scratch / "freed")
        leave_mesh()
    report.note(before=without, with_teacher=with_teacher, after=after, teacher=size)
    report.require(with_teacher >= without + size, "with its teacher the run takes less than the teacher's bytes more")
    report.require(
        after <= 1.01 * without, f"{after} bytes are allocated after free(), and {without} were before the teacher came"
    )


def memory_of_a_teacher(
    directory: Path, allocated: Callable[[], int] = torch.cuda.memory_allocated
) -> tuple[int, int, int, int]:
    """Allocated bytes before, with and after a teacher, and the teacher's own. Inside `one_rank`."""
    teaching.make_teacher(directory)
    leave_mesh()
    break_cycles()  # the model that was saved is gone before anything is measured
    gc.collect()
    lesson = teaching.Lesson(Case(), str(directory))
    student = build_student(lesson.case, 1)
    teaching.lessons(student, None, lesson, 2)  # the optimizer's state is there from the first step on
    without = allocated()
    teacher = teaching.admit(lesson, student)
    teaching.lessons(student, teacher, lesson, 1, start=2)
    with_teacher, size = allocated(), teacher.num_bytes
    teacher.free()
    teaching.lessons(student, None, lesson, 1, start=3)
    return without, with_teacher, allocated(), size


def write_expected(directory: Path, found: dict[str, Numbers]) -> None:
    """Write the recorded numbers, one file a stage and one line a list, in seven digits."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, numbers in found.items():
        text = json.dumps(_rounded(numbers), indent=1)
        text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
        (directory / f"{name}.json").write_text(text + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
