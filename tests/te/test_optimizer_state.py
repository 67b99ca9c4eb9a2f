"""The optimizer's state passes between Transformer Engine's FusedAdam and ours, bit for bit and with its step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

import megatron.core.optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_salt.checkpoint import sharded_state
from megatron_salt.config import ParallelConfig
from megatron_salt.parallel.adamw import FusedAdam
from megatron_salt.train.step import Student
from tests.support.checkpoint_runs import SHARDED, Run, at, start
from tests.support.ranks import run_ranks
from tests.te import engine  # noqa: F401  (skips without Transformer Engine)

STEP = 3


@contextmanager
def optimizer_of(name: str) -> Iterator[None]:
    """megatron-core's choice, or ours in its place."""
    from transformer_engine.pytorch.optimizers import FusedAdam as TheirAdam

    assert megatron.core.optimizer.Adam is TheirAdam is not FusedAdam
    adam = {"ours": FusedAdam, "transformer_engine": TheirAdam}[name]
    with mock.patch.object(megatron.core.optimizer, "Adam", adam), mock.patch.object(distrib_optimizer, "Adam", adam):
        yield


def state_of(student: Student) -> tuple[list[dict[str, Tensor]], int]:
    """Moments and main parameters in the optimizer's order, and the step."""
    parts = [part.optimizer for part in student.optimizer.chained_optimizers]
    moments = [
        {"param": param.detach().clone(), **{name: moment.clone() for name, moment in part.state[param].items()}}
        for part in parts for group in part.param_groups for param in group["params"]
    ]  # fmt: skip
    return moments, sharded_state.optimizer_step(student.optimizer)


def refuse_others(student: Student, name: str) -> None:
    theirs = {
        type(part.optimizer).__module__.startswith("transformer_engine.") for part in student.optimizer.chained_optimizers
    }
    assert theirs == {name == "transformer_engine"}


def saved(name: str, run: Run, final: bool) -> tuple[list[dict[str, Tensor]], int]:
    with optimizer_of(name):
        student, checkpointer, _ = start(run, 1)
        refuse_others(student, name)
        sharded_state._allocate(student.optimizer)
        generator = torch.Generator().manual_seed(7)
        for part in student.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                group["step"] = STEP
                for param in group["params"]:
                    for tensor in (param.data, *part.optimizer.state[param].values()):
                        tensor.copy_(torch.rand(tensor.shape, generator=generator))
        checkpointer.save(at(STEP), final=final)
        return state_of(student)


def loaded(name: str, run: Run) -> tuple[list[dict[str, Tensor]], int]:
    with optimizer_of(name):
        student, _, progress = start(run, 1)
        refuse_others(student, name)
        assert progress == at(STEP)
        return state_of(student)


@pytest.mark.parametrize("one, other", [("ours", "transformer_engine"), ("transformer_engine", "ours")])
@pytest.mark.parametrize("parallel, dtype, final", [
    (SHARDED, torch.bfloat16, True), (SHARDED, torch.bfloat16, False), (SHARDED, torch.float32, True),
    (ParallelConfig(), torch.bfloat16, True),
])  # fmt: skip
def test_state_passes_between_optimizers(
    tmp_path: Path, parallel: ParallelConfig, dtype: torch.dtype, final: bool, one: str, other: str
):
    run = Run(save=str(tmp_path), parallel=parallel, dtype=dtype)
    [(before, step)] = run_ranks(1, saved, one, run, final)
    [(after, same)] = run_ranks(1, loaded, other, replace(run, load=str(tmp_path)))
    assert step == same == STEP
    assert len(before) == len(after) > 10
    for one_param, other_param in zip(before, after, strict=True):
        assert one_param.keys() == other_param.keys() >= {"param", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one_param[key], other_param[key]) for key in one_param)
