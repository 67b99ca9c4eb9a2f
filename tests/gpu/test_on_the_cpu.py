"""What the GPU tests call, on CPU ranks: that it runs and says what it should is known before anybody has a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.precision_steps import Row, table
from megatron_salt.config import ParallelConfig
from tests.gpu.checks import ENGINE, RECIPES, assert_exchanged, assert_same_scores, curve, exchange, in_fp8, why_not
from tests.gpu.ranks import on_cpu, on_devices, program
from tests.support import scoring, teaching
from tests.support.program import train, write_tokens
from tests.support.ranks import run_ranks
from tests.support.small import Case, make_weights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests run here")


@pytest.fixture(autouse=True)
def without_a_gpu() -> Any:
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        yield


def where(word: str) -> tuple[str, int, int, str]:
    return word, dist.get_rank(), dist.get_world_size(), dist.get_backend()


def engine_here() -> tuple[bool, bool]:
    """Whether it can be found, and imported."""
    try:
        importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return False, importlib.util.find_spec("transformer_engine") is not None
    return True, True


def where_and_with_what(word: str) -> tuple[object, ...]:
    return *where(word), engine_here()


def fails() -> None:
    raise ValueError(f"rank {dist.get_rank()} has had enough")


def test_a_function_runs_on_ranks_of_its_own_and_those_of_the_cpus_side_have_no_transformer_engine() -> None:
    assert on_cpu(2, where_and_with_what, "here") == [("here", rank, 2, "gloo", (False, False)) for rank in (0, 1)]


@pytest.mark.long
def test_what_a_rank_raises_is_told() -> None:
    with pytest.raises(AssertionError, match="has had enough"):
        on_devices(1, fails)


@pytest.mark.parametrize("parallel", [
    ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), ParallelConfig(pipeline_model_parallel_size=2),
], ids=["tp2", "pp2"])  # fmt: skip
def test_the_exchange_moves_hidden_states_bit_for_bit(tmp_path: Path, parallel: ParallelConfig) -> None:
    run_ranks(1, teaching.make_teacher, tmp_path, teaching.TEACHER, 2)
    told = run_ranks(2, exchange, teaching.Lesson(Case(parallel=parallel), str(tmp_path)), 2)
    assert_exchanged(told)
    told[1].received[0][0, 0, 0] += 1
    with pytest.raises(AssertionError):
        assert_exchanged(told)


def twice(case: Case, weights: Path) -> tuple[Any, Any]:
    return curve(case, weights, 2), curve(case, weights, 2)


def test_two_models_train_after_each_other_from_the_same_weights(tmp_path: Path) -> None:
    run_ranks(1, make_weights, Case(), tmp_path / "weights")
    [(one, other)] = run_ranks(1, twice, Case(), tmp_path / "weights")
    assert one == other and one.losses[1] < one.losses[0]


@pytest.mark.parametrize("precision", [ENGINE, *map(in_fp8, RECIPES)], ids=["bf16", *RECIPES])
def test_a_machine_without_a_gpu_says_why_it_cannot(precision: Any) -> None:
    assert why_not(precision) is not None


@pytest.mark.long
def test_programs_run_by_torchrun_and_scores_are_compared(tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "words")
    train(data_path=data, train_iters=3, save=tmp_path / "teacher", transformer_impl="torch")
    flags = dict(teacher_load=tmp_path / "teacher", data_path=data, dtype="float32")
    program("tools.score_data", scoring.argv(**flags, output=tmp_path / "alone"))
    scoring.score(2, **flags, output=tmp_path / "two ranks")
    assert_same_scores(tmp_path / "alone", tmp_path / "two ranks")
    scoring.score(1, **flags | {"dtype": "bfloat16"}, output=tmp_path / "rounded")
    with pytest.raises(AssertionError):
        assert_same_scores(tmp_path / "alone", tmp_path / "rounded")


def test_the_table_of_step_times_has_ratios_and_reasons() -> None:
    timed = [Row("torch, bf16", 0.3, 0.2, 1000.0, 0.5), Row("FP8 delayed", 0.15, 0.1, 2000.0, 0.25, 3e-4)]
    rows = [*timed, Row("FP8 mxfp8", refused="too old")]
    header, torch_row, fp8_row, refused = table(rows).splitlines()
    assert torch_row.split() == ["torch,", "bf16", "0.200", "(1.00x)", "0.300", "(1.00x)", "1.50", "1000", "0.500"]
    assert fp8_row.split() == ["FP8", "delayed", "0.100", "(2.00x)", "0.150", "(2.00x)", "1.50", "2000", "0.250", "3.0e-04"]
    assert refused == f"{'FP8 mxfp8':26}not here: too old" and header.split()[:3] == ["stage", "2,", "s"]
