"""NCCL between two GPUs: the exchange of hidden states moves bits, and two ranks train and learn from a teacher as CPU ranks do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_salt.config import ParallelConfig
from megatron_salt.model.loss import KD_METRICS
from tests.gpu.checks import assert_exchanged, exchange
from tests.gpu.ranks import on_cpu, on_devices
from tests.support import teaching
from tests.support.small import Case, make_weights, train

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
pytestmark = [pytest.mark.gpu, needs_two]

LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "cp2": ParallelConfig(context_parallel_size=2),
    "dp2": ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
}
EXACT = dict(rel=1e-4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("teacher")
    on_cpu(1, teaching.make_teacher, directory, teaching.TEACHER, 10)
    return str(directory)


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_the_exchange_moves_hidden_states_bit_for_bit(teacher: str, name: str) -> None:
    assert_exchanged(on_devices(2, exchange, teaching.Lesson(Case(parallel=LAYOUTS[name]), teacher), 2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_train_as_two_cpu_ranks(tmp_path: Path, name: str) -> None:
    case = Case(parallel=LAYOUTS[name])
    on_cpu(1, make_weights, case, tmp_path / "weights")
    gpu, cpu = (run(2, train, case, 2, tmp_path / "weights") for run in (on_devices, on_cpu))
    assert gpu[0].losses == pytest.approx(cpu[0].losses, **EXACT)
    assert gpu[0].grad_norms == pytest.approx(cpu[0].grad_norms, rel=5e-4)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2)], ids=lambda layout: f"teacher tp{layout[0]}pp{layout[1]}")
@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_a_teacher_teaches_two_gpus_as_two_cpu_ranks(tmp_path: Path, teacher: str, name: str, layout: tuple[int, int]) -> None:
    lesson = teaching.Lesson(Case(parallel=LAYOUTS[name]), teacher, layout)
    on_cpu(1, make_weights, lesson.case, tmp_path / "weights")
    gpu, cpu = (run(2, teaching.teach, lesson, 2, tmp_path / "weights") for run in (on_devices, on_cpu))
    for metric in ("loss", "ce", "kl", "teacher_ce"):
        number = KD_METRICS.index(metric)
        assert [sums[number] for sums in gpu[0].sums] == pytest.approx([sums[number] for sums in cpu[0].sums], **EXACT)
