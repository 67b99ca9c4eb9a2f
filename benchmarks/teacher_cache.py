"""--teacher-cache: time of a step of stage 1 divided by that of a plain step, with the live teacher, with the live teacher while its hidden
states are written, and with a cache that holds all of them. On one CPU core.

    python benchmarks/teacher_cache.py --steps 20       two models

The program's own `build` makes student and teacher, from a teacher's checkpoint that the program wrote. The same run then takes steps of
all kinds in turns, on the same samples, so that other work on the machine matters little; the data is read in each of them. "Head alone"
has its hidden states in memory: what no cache can save. Each kind counts by the fastest tenth of its steps, in CPU seconds of all
threads, those that read and write a cache included. Wall-clock ratios and the bytes of a token are told beside.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from results import result, whole
from stage1_overhead import (
    MICROBATCHES,
    SEQ_LENGTH,
    SHAPES,
    Shape,
    fastest_tenth,
    launch,
    student_run,
    teach_for_one_step,
    timed,
)  # fmt: skip

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from megatron_salt.cli import parse
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.parallel.launch import distributed
from megatron_salt.parallel.layout import student_layout
from megatron_salt.salt.schedule import StepWeights
from megatron_salt.salt.teacher_cache.cache import TeacherCache
from megatron_salt.salt.teacher_cache.shards import Index, SampleShape, open_shard, shard_names
from megatron_salt.salt.teacher_cache.writer import CacheWriter
from megatron_salt.train.build import build
from megatron_salt.train.build_model import dtype_of
from megatron_salt.train.inputs import read_inputs
from megatron_salt.train.plan import plan_run
from megatron_salt.train.start import identify, name_data
from megatron_salt.train.step import train_step

WIDTHS = (9, 9, 9, 12, 12, 9, 9, 15)
SAVED = 0.9
"""The goal: a full cache saves this part of what the teacher's layers cost, the reading of hidden states included."""


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--steps", type=whole, default=20, help="steps of each kind, for each model")
    asked.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "middle"])
    asked.add_argument("--bf16", action="store_true")
    asked.add_argument("--rank-of", metavar="FOLDER", help=argparse.SUPPRESS)
    flags = asked.parse_args()
    if flags.rank_of is not None:
        take_steps(Path(flags.rank_of), flags.shapes[0], flags.steps)
        return
    print(
        f"{MICROBATCHES} microbatches of {SEQ_LENGTH} tokens a step; {'bfloat16' if flags.bf16 else 'float32'}; 1 is a plain step"
    )
    titles = ("live", "writing", "cached", "head alone", "wall: live", "writing", "cached", "bytes a token")
    print(f"{'':8}" + "".join(f"{title:>{width}}" for title, width in zip(titles, WIDTHS, strict=True)))
    for name in flags.shapes:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, SHAPES[name], Path(folder), flags.bf16, flags.steps)


def measure(name: str, shape: Shape, folder: Path, bf16: bool, steps: int) -> None:
    """Let a process of its own take the steps of one model, and print its line of the table."""
    teach_for_one_step(folder, shape, bf16)
    (folder / "student.yaml").write_text(to_yaml(student_run(folder, shape, 1, bf16)))
    launch(1, str(Path(__file__).resolve()), "--rank-of", str(folder), "--shapes", name, "--steps", str(steps))


def take_steps(folder: Path, name: str, steps: int) -> None:
    """Build the run, take its steps in turns, and print the figures."""
    torch.set_num_threads(1)
    config = parse(["--config", str(folder / "student.yaml")])
    inputs, timeout = read_inputs(config), timedelta(minutes=10)
    with distributed(timeout):
        layout = student_layout(config.parallel, 1)
        plan = plan_run(config.training, config.parallel, layout, config.salt)
        run, _ = build(config, plan, layout, inputs, identify(config, inputs, name_data(config, plan, inputs)), timeout=timeout)
        assert run.stage1 is not None and run.stage1.teacher is not None and inputs.teacher is not None
        teacher, student, weight = run.stage1.teacher, run.student, StepWeights(soft_labels=config.salt.kd_weight)
        shape = SampleShape(SEQ_LENGTH, inputs.teacher.model.hidden_size, str(dtype_of(config.training)).removeprefix("torch."))

        def plain() -> None:
            train_step(student, run.train.fetch(0), PhaseTimer())

        def live() -> None:
            train_step(student, run.train.fetch(0), PhaseTimer(), teacher, weight)

        def writing() -> None:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            (folder / "cache").mkdir()
            writer = CacheWriter(folder / "cache", Index([], shape))
            train_step(student, run.train.fetch(0), PhaseTimer(), teacher, weight, writer.keep)
            writer.finish()

        writing()
        names = shard_names(folder / "cache")
        shutil.copytree(folder / "cache", folder / "kept")
        index = Index([open_shard(folder / "kept" / one, shape) for one in names], shape)
        cached_data = run.train.with_cached(
            TeacherCache(
                folder / "kept", index, student.mesh, stages=frozenset({0}), writes=False, forward_samples=1
            ).add_cached
        )

        def cached() -> None:
            train_step(student, cached_data.fetch(0), PhaseTimer(), teacher, weight)

        held = cached_data.fetch(0)

        def head_alone() -> None:
            train_step(student, held, PhaseTimer(), teacher, weight)

        assert all(one.cached is not None and one.cached.present.all() for one in held)
        kinds: list[Callable[[], None]] = [plain, live, writing, cached, head_alone]
        times = np.array([[timed(kind) for kind in kinds] for _ in range(steps + 1)])[1:]  # [steps][kinds][wall, CPU]
    wall, cpu = (fastest_tenth(times[:, :, clock]) for clock in (0, 1))
    of_plain, of_wall = cpu / cpu[0], wall / wall[0]
    stored = sum((folder / "kept" / one).stat().st_size for one in names) / (MICROBATCHES * SEQ_LENGTH)
    figures = [f"{ratio:.3f}x" for ratio in (*of_plain[1:], *of_wall[1:4])] + [f"{stored:.1f}"]
    print(f"{name:8}" + "".join(f"{figure:>{width}}" for figure, width in zip(figures, WIDTHS, strict=True)), flush=True)
    result(f"saved_of_the_teachers_layers_{name}", (cpu[1] - cpu[3]) / (cpu[1] - cpu[4]), SAVED)


if __name__ == "__main__":
    main()
