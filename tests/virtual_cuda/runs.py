"""Whole runs of pretrain under virtual CUDA, and the same on CPU ranks.

A run has two starts. The first makes steps 1 to 3 of stage 1, saves in the background at step 2, and leaves. The second resumes, saves
and evaluates at step 5, the last of stage 1, frees the teacher, and makes steps 6 to 8.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import program
from tests.support.virtual_cuda.ranks import Recorded, run_virtual

FLAGS: dict[str, Any] = dict(
    micro_batch_size=1, global_batch_size=4, loss_chunk_tokens=None, transformer_impl="torch", train_iters=8, kd_steps=5,
    kd_teacher_temperature=0.25, eval_iters=1, eval_interval=5, valid_share=0.2, log_interval=2, exit_signal_handler=True,
)  # fmt: skip
"""A microbatch is one sample: Triton's interpreter takes the rows of the output head one by one."""
FIRST: dict[str, Any] = dict(save_interval=2, async_save=True, exit_interval=3)
SECOND: dict[str, Any] = dict(save_interval=5)
SHARDED = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


@dataclass(frozen=True)
class Case:
    """A layout and what else a run has."""

    world_size: int
    flags: dict[str, Any] = field(default_factory=dict)


CASES = {
    "dp2": Case(2, SHARDED),
    "cp2": Case(2, dict(context_parallel_size=2)),
    "vp2": Case(2, dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2, num_layers=4)),
    "recompute": Case(1, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)),
    "1 rank": Case(1, SHARDED | dict(bf16=True)),
    "pp2": Case(2, dict(pipeline_model_parallel_size=2, teacher_pipeline_model_parallel_size=2)),
    "tp2 sp": Case(
        2, SHARDED | dict(tensor_model_parallel_size=2, sequence_parallel=True, teacher_tensor_model_parallel_size=2)
    ),
}
"""The last is the one of `make test-short`."""
FULL = ("dp2", "cp2", "vp2", "recompute")
"""Cases of `make test-full` alone."""


@dataclass(frozen=True)
class Run:
    """What a case left: by start, then by rank."""

    first: list[Recorded]
    second: list[Recorded]
    losses: dict[int, float]
    """{step: loss}."""


@functools.cache
def directory() -> Path:
    """Where the runs of this process save; it is deleted at exit."""
    made = Path(tempfile.mkdtemp(prefix="virtual-cuda-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def data() -> str:
    """A dataset; its prefix."""
    return program.write_tokens(directory() / "words", windows=200)


@functools.cache
def teacher() -> str:
    """A teacher's checkpoint, trained on a CPU rank."""
    save = directory() / "teacher"
    program.train(
        1, data_path=data(), train_iters=4, save=save, untie_embeddings_and_output_weights=True, transformer_impl="torch"
    )
    return str(save)


def flags_of(name: str, save: Path) -> dict[str, Any]:
    """What both starts of a case have in common."""
    return FLAGS | CASES[name].flags | dict(data_path=data(), teacher_load=teacher(), save=save)


@functools.cache
def virtual_run(name: str) -> Run:
    """The case under virtual CUDA."""
    save, world_size = directory() / name.replace(" ", "-"), CASES[name].world_size
    starts = [
        _start(world_size, flags_of(name, save) | FIRST),
        _start(world_size, flags_of(name, save) | SECOND | dict(load=save)),
    ]
    return Run(*starts, program.losses(save))


def _start(world_size: int, flags: dict[str, Any]) -> list[Recorded]:
    ranks = run_virtual(world_size, program.main, program.argv(**flags))
    assert [rank.result.status for rank in ranks] == [0] * world_size, [rank.result.err for rank in ranks]
    return ranks


@functools.cache
def losses_on_the_cpu(name: str) -> dict[int, float]:
    """The losses of the case on CPU ranks, without a break."""
    save = directory() / f"{name.replace(' ', '-')}-cpu"
    program.train(CASES[name].world_size, **flags_of(name, save) | SECOND)
    return program.losses(save)
