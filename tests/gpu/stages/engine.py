"""The stages of tests/gpu/first_run_te.py: Transformer Engine's layers and FP8, against torch's layers and bfloat16 on the same GPU.

Where Transformer Engine is not installed, or the GPU lacks a recipe, a stage says so. All runs are `pretrain.main` in this process.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import precision_steps
from megatron_salt.model.precision import Fp8Recipe, Precision
from tests.gpu.checks import ENGINE, RECIPES, WIDE, curve, in_fp8, why_not
from tests.gpu.stages import machine, pair
from tests.gpu.stages.runner import NotHereError, Report, Setting, Stage
from tests.gpu.stages.small_model import leave_mesh, one_rank, run_program
from tests.support.program import argv, entries, losses, write_tokens
from tests.support.small import MODELS, Case, make_weights

Flags = dict[str, Any]
LOSS, GRADIENT = 5e-3, 5e-2
"""Relative tolerances of the first loss and gradient norm of two implementations in bfloat16."""
FP8_CASE = Case(model=WIDE, dtype=torch.bfloat16, micro_batch_size=4, learning_rate=1e-3)
MODEL: Flags = dict(
    num_layers=4, hidden_size=256, ffn_hidden_size=512, untie_embeddings_and_output_weights=True, seq_length=128, bf16=True, lr=3e-3,
    loss_chunk_tokens=None,
)  # fmt: skip
LINEAR_WEIGHTS = 4 * (256 * (2 * 256 + 2 * 128) + 3 * 256 * 512)
"""Of a model with MODEL's layers."""
BF16: Flags = dict(transformer_impl="transformer_engine")


def need(precision: Precision) -> None:
    """Raise NotHereError with the reason where this machine cannot do it."""
    if (reason := why_not(precision)) is not None:
        raise NotHereError(reason)


def student_flags(recipe: Fp8Recipe) -> Flags:
    """A student in FP8; delayed with the history that its curve needs."""
    history = dict(fp8_amax_history_len=16, fp8_amax_compute_algo="max") if recipe == "delayed" else {}
    return BF16 | dict(fp8_format="hybrid", fp8_recipe=recipe) | history


# ---- what the stages do, with any precision --------------------------------------------------------------------------------------


def first_steps(report: Report, scratch: Path, precision: Precision) -> None:
    """Three steps of two families of models from one checkpoint each, beside torch's layers."""
    for name in ("tied", "gpt2"):
        case, weights = Case(model=MODELS[name], dtype=torch.bfloat16), scratch / f"weights-{name}"
        with one_rank():
            make_weights(case, weights)
            leave_mesh()
            plain, other = (curve(one, weights, 3) for one in (case, replace(case, precision=precision)))
        report.compare(f"{name}: losses", other.losses, plain.losses, LOSS)
        report.compare(f"{name}: gradient norms", other.grad_norms, plain.grad_norms, GRADIENT)


def follows(report: Report, scratch: Path, base: Precision, precision: Precision, steps: int) -> None:
    """The loss follows that of `base`, from one checkpoint, within 0.1 and in the mean of the last tenth within 1%."""
    weights = scratch / "wide weights"
    with one_rank():
        make_weights(FP8_CASE, weights)
        leave_mesh()
        wanted, found = (curve(replace(FP8_CASE, precision=one), weights, steps).losses for one in (base, precision))
    report.note(first_and_last=[found[0], found[-1]], first_and_last_in_bf16=[wanted[0], wanted[-1]])
    report.compare("losses", found, wanted, 0.0, absolute=0.1)
    last = -(-steps // 10)
    report.compare("mean of the last losses", [sum(found[-last:]) / last], [sum(wanted[-last:]) / last], 0.01)
    report.require(wanted[0] - wanted[-1] > 0.2, f"nothing was learnt in {steps} steps")


def resumes(report: Report, scratch: Path, flags: Flags, steps: int) -> None:
    """A run saves in the middle; from there it goes on as the uninterrupted one: scales and their history are in the checkpoint."""
    data = write_tokens(scratch / "words", windows=2000)
    run = argv(**MODEL | flags, data_path=data, train_iters=steps, save_interval=steps // 2, save=scratch / "saved")
    run_program(run)
    resumed = argv(**MODEL | flags, data_path=data, train_iters=steps, load=scratch / "saved" / f"iter_{steps // 2:07d}",
                   save=scratch / "resumed")  # fmt: skip
    run_program(resumed)
    wanted, found = losses(scratch / "saved"), losses(scratch / "resumed")
    report.compare(
        "losses after the resume", [found[step] for step in sorted(found)], [wanted[step] for step in sorted(found)], 1e-3
    )
    report.note(same_bits=all(found[step] == wanted[step] for step in found))


def teaches(scratch: Path, flags: Flags, teacher_flags: Flags, steps: int) -> Flags:
    """A run with a teacher of the student's size: what its gate said, the bytes that the switch gave back, and the teacher's losses."""
    data = write_tokens(scratch / "words", windows=2000)
    teacher = scratch / "teacher"
    if not teacher.exists():
        run_program(argv(**MODEL | flags, data_path=data, train_iters=steps, save=teacher))
    save = scratch / ("student " + " ".join(map(str, teacher_flags.values())))
    run_program(
        argv(
            **MODEL | flags | teacher_flags,
            data_path=data,
            train_iters=steps,
            kd_steps=steps // 2,
            teacher_load=teacher,
            save=save,
        )
    )
    [switch] = [entry for entry in entries(save, "event") if entry.get("stage") == 2]
    gates = [entry["teacher_fp8"] for entry in entries(save, "event") if "teacher_fp8" in entry]
    return dict(
        gate=gates[0] if gates else {}, freed=(switch["memory_gib_before"] - switch["memory_gib_after"]) * 2**30,
        teacher_ce=[entry["teacher_ce"] for entry in entries(save) if "teacher_ce" in entry],
    )  # fmt: skip


# ---- the stages ------------------------------------------------------------------------------------------------------------------


def against_torch(setting: Setting, report: Report) -> None:
    """First loss and gradient norm in bfloat16."""
    need(ENGINE)
    first_steps(report, setting.scratch, ENGINE)


def student(recipe: Fp8Recipe, setting: Setting, report: Report) -> None:
    """A student in FP8 learns as in bfloat16, and resumes."""
    need(in_fp8(recipe))
    folder = setting.scratch / recipe
    folder.mkdir()
    follows(report, folder, ENGINE, in_fp8(recipe), 60)
    resumes(report, folder, student_flags(recipe), 12)


def teacher(recipe: Fp8Recipe, setting: Setting, report: Report) -> None:
    """A teacher in FP8 passes its gate, takes less memory, and teaches as in bfloat16."""
    need(in_fp8(recipe))
    folder = setting.scratch / f"teacher-{recipe}"
    folder.mkdir()
    bf16 = teaches(folder, BF16, {}, 30)
    fp8 = teaches(folder, BF16, dict(teacher_fp8_format="hybrid", teacher_fp8_recipe=recipe), 30)
    report.note(kl=fp8["gate"]["kl"], max_kl=fp8["gate"]["max_kl"], freed_mib=[bf16["freed"] / 2**20, fp8["freed"] / 2**20])
    report.require(0 < fp8["gate"]["kl"] < fp8["gate"]["max_kl"], "the gate's KL is not between 0 and its limit")
    report.require(bf16["freed"] - fp8["freed"] > 0.9 * LINEAR_WEIGHTS, "the teacher in FP8 takes no byte a weight less")
    report.compare("teacher's losses", fp8["teacher_ce"], bf16["teacher_ce"], 0.02)


def weights_in_fp8(setting: Setting, report: Report) -> None:
    """--fp8-param-gather: weights in FP8 alone; saved, resumed."""
    need(in_fp8("tensorwise"))
    folder = setting.scratch / "fp8-params"
    folder.mkdir()
    resumes(report, folder, student_flags("tensorwise") | dict(fp8_param_gather=True, use_distributed_optimizer=True), 12)


def step_times(setting: Setting, report: Report) -> None:
    """12 steps of the pair of models with each precision, half of them with a teacher."""
    need(ENGINE)
    sizes = precision_steps.TINY if setting.tiny else pair.PAIR
    report.note(rows=rows_of(setting, sizes, precision_steps.ways(), 12))


def rows_of(setting: Setting, sizes: precision_steps.Sizes, ways: dict[str, list[str]], steps: int) -> list[Flags]:
    """A row of step times for each way, or why it is not to be had."""
    precision_steps.write_data(setting.scratch, sizes)
    saved = pair.save_teacher(setting.scratch, sizes, setting)
    batch, rows = str(sizes.micro_batch_size * sizes.microbatches), []
    for number, (name, flags) in enumerate(ways.items()):
        words = [*sizes.student.split(), "--train-iters", str(steps), "--global-batch-size", batch, "--kd-steps", str(steps // 2),
                 "--teacher-load", str(saved), *flags]  # fmt: skip
        try:
            ran = pair.run(setting.scratch, f"row-{number}", words, sizes, setting)
        except AssertionError as error:
            rows.append({"run": name, "not here": str(error).partition("error: ")[2].strip() or str(error)[-300:]})
            continue
        both = pair.speed(ran, range(3, steps // 2 + 1)), pair.speed(ran, range(steps // 2 + 3, steps + 1))
        rows.append({"run": name, "stage 1, s": both[0]["seconds a step"], "stage 2, s": both[1]["seconds a step"],
                     "tokens/s": both[1]["tokens/s"], "TFLOP/s": both[1]["TFLOP/s"], "GiB": both[1]["GiB"]})  # fmt: skip
    return rows


STAGES = [
    Stage("machine", 30, machine.describe),
    Stage("bfloat16 against torch's layers", 90, against_torch),
    *(Stage(f"student in FP8, {recipe}", 60, partial(student, recipe)) for recipe in RECIPES),
    *(Stage(f"teacher in FP8, {recipe}", 45, partial(teacher, recipe)) for recipe in RECIPES if recipe != "delayed"),
    Stage("weights in FP8 alone", 30, weights_in_fp8),
    Stage("step times by precision", 150, step_times),
]
