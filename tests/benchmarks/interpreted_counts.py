"""The counts of the output head's kernels, in Triton's interpreter. `test_head_roofline.py` runs this file in a process of its own.

Not named test_*: Triton reads TRITON_INTERPRET as a kernel is defined, so these tests need an environment of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.head_bytes import DTYPE, FORMS, ByteCounter, bytes_a_logit
from benchmarks.head_roofline import GOALS, print_results
from megatron_salt.model.kernels import INTERPRETED, passes, triton_passes
from megatron_salt.parallel.launch import distributed
from megatron_salt.salt.head_cost import HeadShape, pass_bytes
from tests.support.virtual_cuda.triton_interpreter import prepare_once_a_kernel

assert INTERPRETED, "run by tests/benchmarks/test_head_roofline.py, with TRITON_INTERPRET=1"
prepare_once_a_kernel()


@pytest.fixture(autouse=True, scope="module")
def _alone() -> Iterator[None]:
    with distributed(timedelta(minutes=2)):
        yield


@triton.jit
def scale_kernel(logits, num_columns, stride, BLOCK: tl.constexpr):
    """Divide a row by 1, in place: a pass that a fused head does not need."""
    place = logits + tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    for first in range(0, num_columns, BLOCK):
        mask = first + tl.arange(0, BLOCK) < num_columns
        tl.store(place + first, tl.load(place + first, mask=mask), mask=mask)


@torch.library.custom_op("megatron_salt_tests::scale_by_a_kernel", mutates_args=("logits",))
def scale_by_a_kernel(logits: Tensor) -> None:
    scale_kernel[(logits.size(0),)](logits, logits.size(1), logits.stride(0), BLOCK=1024)


@torch.library.custom_op("megatron_salt_tests::scale_by_torch", mutates_args=("logits",))
def scale_by_torch(logits: Tensor) -> None:
    logits.mul_(1)


@pytest.mark.parametrize("vocabularies", [(1024, 4992), (1003, 5003)])
def test_each_logit_is_read_twice_and_written_once(vocabularies: tuple[int, int]) -> None:
    """In scoring, which has no gradient, read twice. The bytes of a logit are those of the products' results."""
    counts = {form: bytes_a_logit(form, vocabularies) for form in FORMS}
    products = {form: sum(count["products"].values()) for form, count in counts.items()}
    student = products["plain"] / 3  # written, and read for two gradients
    teacher = products["kd, T 1"] - products["plain"]
    expected = {
        "kd, T 1": 3 * student + 2 * teacher,
        "kd, T 0.25": 3 * student + 2 * teacher,
        "kd, T 0.25, rank": 3 * student + 3 * teacher,
        "kd, T 0.25, entropy": 3 * student + 2 * teacher,
        "plain": 3 * student,
        "scoring": 8,
    }
    moved = {form: sum(count["passes"].values()) for form, count in counts.items()}
    assert moved == pytest.approx(expected, rel=0.01)  # a block of a row reads a few numbers of its row as well
    cost = HeadShape(
        rows=1, hidden=1, teacher_hidden=1, tokens=1, chunk_tokens=1, itemsize=DTYPE.itemsize, kernels=True, tempered=True
    )  # fmt: skip
    assert expected["plain"] == pass_bytes(cost, taught=False) and expected["kd, T 1"] == pass_bytes(cost, taught=True)
    by_rank = replace(cost, gate="rank")
    assert (
        expected["kd, T 0.25, rank"] == pass_bytes(by_rank, taught=True)
        and pass_bytes(by_rank, taught=False) == expected["plain"]
    )
    assert expected["kd, T 0.25, entropy"] == pass_bytes(replace(cost, gate="entropy"), taught=True)
    assert all(moved[form] <= goal for form, goal in GOALS.items())
    assert set(counts["plain"]["passes"]) == {"row_sums_kernel", "into_gradient_kernel"}


@pytest.mark.parametrize("waste", [scale_by_a_kernel, scale_by_torch])
def test_a_head_with_one_pass_more_misses_the_goal(
    waste: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pass is over the logits of each model: in a kernel, or in an operation of torch inside of an operation of ours."""
    fused = triton_passes.row_sums

    def wasteful(student: Tensor, teacher: Tensor | None, *rest: object) -> None:
        for logits in (student,) if teacher is None else (student, teacher):
            waste(logits)  # type: ignore[operator]
        fused(student, teacher, *rest)

    monkeypatch.setattr(triton_passes, "row_sums", wasteful)
    print_results({form: bytes_a_logit(form) for form in GOALS})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(GOALS) and all(line.startswith("RESULT name=kernels_bytes") for line in lines)
    assert [line for line in lines if not line.endswith(" short")] == []


def test_only_lanes_that_are_not_masked_count() -> None:
    """Three rows of 70 logits with room for 128, and without; a threshold and a count for each row."""
    for logits, columns in ((torch.ones(3, 128)[:, :70], 128), (torch.ones(3, 71)[:, :70], 70)):
        with ByteCounter().counting() as traffic:
            triton_passes.count_above(logits, torch.zeros(3), torch.zeros(3))
        assert traffic.passes["count_above_kernel"] == 3 * (columns + 2) * 4 and traffic.launches == 1


def test_a_count_of_kernels_that_did_not_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "kernels_for", lambda device: None)
    with pytest.raises(RuntimeError, match="no kernel ran in the form 'plain'"):
        bytes_a_logit("plain")
