"""Runs that write and read one cache learn what they learn from the live teacher, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.program import entries, numbers, tensors, train

STEPS, KD_STEPS = 4, 3
GLOBAL_BATCH = 8
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
CP2 = dict(context_parallel_size=2)
DP2 = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
TEACHER_TP2 = dict(teacher_tensor_model_parallel_size=2)
TEACHER_PP2 = dict(teacher_pipeline_model_parallel_size=2)


def salt(data: str, teacher: Path, **flags: Any) -> dict[str, Any]:
    """Flags of a run of four steps, of which three have the teacher."""
    return dict(data_path=data, train_iters=STEPS, teacher_load=teacher, kd_steps=KD_STEPS) | flags


def taught(save: Path) -> list[tuple[Any, ...]]:
    """The figures of teacher and student for every step of stage 1."""
    names = ("step", "kd_weight", "ce", "kl", "teacher_ce", "agreement")
    return [tuple(entry[name] for name in names) for entry in entries(save) if "kd_weight" in entry]


def shares(save: Path) -> list[float]:
    """What share of each step's samples came from the cache."""
    return [entry["teacher_cached"] for entry in entries(save) if "kd_weight" in entry]


def totals(save: Path) -> dict[str, Any]:
    """What the run did with its cache."""
    (found,) = [entry["teacher_cache"] for entry in entries(save, "event") if "teacher_cache" in entry]
    return found


def same(one: Path, other: Path) -> None:
    """Both runs have the same losses, gradients, teacher's figures and last checkpoint, bit for bit."""
    assert numbers(one) == numbers(other) and taught(one) == taught(other) and len(taught(one)) == KD_STEPS
    assert tensors(one, STEPS) == tensors(other, STEPS)


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(1, dict(), id="serial"),
        pytest.param(2, dict(TP2, **TEACHER_PP2), id="tp2, teacher pp2"),
        pytest.param(2, dict(PP2, **TEACHER_TP2, bf16=True), id="pp2 bf16, teacher tp2"),
        pytest.param(2, dict(DP2, teacher_micro_batch_size=4), id="dp2, merged", marks=pytest.mark.long),
        pytest.param(2, dict(CP2, **TEACHER_TP2), id="cp2, teacher tp2", marks=pytest.mark.long),
        pytest.param(4, dict(TP2, **CP2, bf16=True), id="tp2cp2 bf16, four teachers", marks=pytest.mark.full),
        pytest.param(4, dict(TP2, **PP2, **TEACHER_TP2), id="tp2pp2, two teachers of tp2", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_curves_are_those_of_the_live_teacher(
    tmp_path: Path, data: str, teacher: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """The first run writes, the second reads and never loads the teacher's layers."""
    flags = salt(data, teacher, **flags)
    train(world_size, **flags, save=tmp_path / "live")
    train(world_size, **flags, save=tmp_path / "cold", teacher_cache=tmp_path / "cache")
    warm = train(world_size, **flags, save=tmp_path / "warm", teacher_cache=tmp_path / "cache")
    same(tmp_path / "cold", tmp_path / "live")
    same(tmp_path / "warm", tmp_path / "live")
    assert "the teacher's layers are not loaded" in warm.err
    assert shares(tmp_path / "cold") == [0.0] * KD_STEPS and shares(tmp_path / "warm") == [1.0] * KD_STEPS
    cold, read = totals(tmp_path / "cold"), totals(tmp_path / "warm")
    samples, width = KD_STEPS * GLOBAL_BATCH, 2 if flags.get("bf16") else 4
    assert cold["samples_written"] == samples and cold["bytes_read"] == cold["samples_cached"] == read["samples_written"] == 0
    assert (
        read["samples_cached"] == samples and read["bytes_read"] == samples * 16 * 16 * width
    )  # each position once: tokens, hidden size
