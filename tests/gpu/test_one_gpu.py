"""What only a GPU can show, on one: NCCL, CUDA kernels and generators under the very code that the CPU tests run.

Skipped where there is none. The CPU's side of a comparison runs in the pool of ranks, which never sees the GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.gpu.ranks import on_cpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("world")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_training_is_the_same_on_gpu_and_cpu(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    from tests.support import small

    case = small.Case(dtype=dtype)
    on_cpu(1, small.make_weights, case, tmp_path / "weights")
    cpu = on_cpu(1, small.train, case, 1, tmp_path / "weights")[0]
    gpu = small.train(case, 1, tmp_path / "weights")
    assert gpu.losses == pytest.approx(cpu.losses, rel=tolerance)
    assert gpu.grad_norms == pytest.approx(cpu.grad_norms, rel=5 * tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_fused_loss_equals_full_logits_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    import torch.distributed as dist

    from megatron_salt.model.loss import fused_linear_cross_entropy
    from megatron_salt.model.vocab_parallel import VocabularyShard
    from tests.model.test_loss import ROWS, Case, make_inputs, oracle, relative_error

    inputs = make_inputs(Case(dtype=dtype))
    exact_loss, exact_hidden, exact_weight = oracle(inputs, ROWS)
    hidden, weight = inputs.hidden.cuda().requires_grad_(), inputs.weight.cuda().requires_grad_()
    shard = VocabularyShard(dist.group.WORLD, ROWS, ROWS, False)
    loss, _ = fused_linear_cross_entropy(hidden, weight, inputs.labels.cuda(), inputs.mask.cuda(), shard, 16)
    loss.backward()
    assert float(loss) == pytest.approx(float(exact_loss), rel=tolerance)
    assert relative_error(hidden.grad.cpu(), exact_hidden) < tolerance
    assert relative_error(weight.grad.cpu(), exact_weight) < tolerance


@pytest.mark.parametrize("async_save", [False, True])
def test_a_resumed_run_continues_with_the_same_state(tmp_path: Path, async_save: bool) -> None:
    from tests.support.checkpoint_runs import DROPOUT, Run, at, start
    from tests.support.small import train_student

    run = Run(save=str(tmp_path), model=DROPOUT, dtype=torch.bfloat16, flags={"async_save": async_save})
    student, checkpointer, _ = start(run, 1)
    train_student(student, run.case, 2)
    checkpointer.save(at(2))
    checkpointer.finish()
    uninterrupted = train_student(student, run.case, 2, start=2).losses
    _leave_mesh()
    student, _, progress = start(replace(run, load=str(tmp_path)), 1)
    assert progress is not None and progress.step == 2
    assert train_student(student, run.case, 2, start=2).losses == pytest.approx(uninterrupted, rel=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_a_teacher_teaches_the_same_on_gpu_and_cpu(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    from megatron_salt.model.loss import KD_METRICS
    from tests.support import teaching
    from tests.support.small import Case, make_weights

    on_cpu(1, teaching.make_teacher, tmp_path / "teacher")
    lesson = teaching.Lesson(Case(dtype=dtype), str(tmp_path / "teacher"))
    on_cpu(1, make_weights, lesson.case, tmp_path / "weights")
    cpu = on_cpu(1, teaching.teach, lesson, 1, tmp_path / "weights")[0]
    gpu = teaching.teach(lesson, 1, tmp_path / "weights")
    for name in ("loss", "ce", "teacher_ce"):
        number = KD_METRICS.index(name)
        assert [sums[number] for sums in gpu.sums] == pytest.approx([sums[number] for sums in cpu.sums], rel=tolerance)


def test_a_freed_teacher_leaves_the_devices_memory_as_it_was(tmp_path: Path) -> None:
    from tests.support import teaching
    from tests.support.small import Case, build_student

    on_cpu(1, teaching.make_teacher, tmp_path)
    lesson = teaching.Lesson(Case(), str(tmp_path))
    student = build_student(lesson.case, 1)
    teaching.lessons(student, None, lesson, 2)  # the optimizer's state is there from the first step on
    without = torch.cuda.memory_allocated()
    teacher = teaching.admit(lesson, student)
    teaching.lessons(student, teacher, lesson, 1, start=2)
    assert torch.cuda.memory_allocated() >= without + teacher.num_bytes
    teacher.free()
    teaching.lessons(student, None, lesson, 1, start=3)
    assert torch.cuda.memory_allocated() == pytest.approx(without, rel=0.01)


def _leave_mesh() -> None:
    import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
