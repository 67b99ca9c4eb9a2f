"""What benchmarks/head_roofline.py counts and estimates. `interpreted_counts.py` has the kernels, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.head_bytes import FORMS, ByteCounter, bytes_a_logit
from benchmarks.head_roofline import SHAPES, LogitBytes, head_times
from megatron_salt.cards import Rates
from megatron_salt.salt import head_cost
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
H100 = Rates(flops=700e12, bytes=3.0e12)


@pytest.mark.long
def test_the_counts_of_the_kernels_hold_and_a_pass_more_misses_the_goal() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/benchmarks/interpreted_counts.py"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


ROW, WIDE, OTHER = torch.ones(6), torch.ones(4, 6), torch.ones(4, 6)  # 24, 96 and 96 bytes
HALF = torch.ones(4, 6, dtype=torch.bfloat16)
COLUMNS = torch.zeros(4, 1, dtype=torch.int64)


def counted_by_torch() -> dict[str, float]:
    """Bytes a logit of the passes over logits, on a rank."""
    return {form: sum(bytes_a_logit(form)["passes"].values()) for form in FORMS if form != "scoring"}


def cost_shape(shape: int, chunk: int, kernels: bool, tempered: bool) -> head_cost.HeadShape:
    """One of SHAPES in the words of the predicted cost."""
    one = SHAPES[shape]
    return head_cost.HeadShape(
        rows=one.rows, hidden=one.hidden_size, teacher_hidden=one.teacher_hidden_size, tokens=one.microbatch_tokens,
        chunk_tokens=chunk, itemsize=2, kernels=kernels, tempered=tempered,
    )  # fmt: skip


def test_the_predicted_cost_of_stage_1_has_the_bytes_that_are_counted() -> None:
    """Of torch's operations; `interpreted_counts.py` has the kernels."""
    plain, tempered = (cost_shape(0, 512, False, tempered) for tempered in (False, True))
    predicted = {
        "kd, T 1": head_cost.pass_bytes(plain, taught=True),
        "kd, T 0.25": head_cost.pass_bytes(tempered, taught=True),
        "kd, T 0.25, rank": head_cost.pass_bytes(replace(tempered, gate="rank"), taught=True),
        "kd, T 0.25, entropy": head_cost.pass_bytes(replace(tempered, gate="entropy"), taught=True),
        "plain": head_cost.pass_bytes(plain, taught=False),
    }
    assert run_ranks(1, counted_by_torch) == [predicted]


@pytest.mark.parametrize("shape, chunk, kernels", [(0, 512, False), (2, 256, False), (2, 5120, True), (1, 4096, True)])
@pytest.mark.parametrize("taught", [False, True])
def test_the_predicted_time_of_the_head_is_the_estimate(shape: int, chunk: int, kernels: bool, taught: bool) -> None:
    """But for hidden states, which the estimate leaves out."""
    cost = cost_shape(shape, chunk, kernels, tempered=True)
    logit = LogitBytes(passes=head_cost.pass_bytes(cost, taught), student=2, teacher=4 if taught else 0)
    estimate = head_times(SHAPES[shape], chunk, logit, H100).total * 1e-6 * cost.tokens
    assert estimate == pytest.approx(head_cost.head_seconds(cost, H100, H100 if taught else None), rel=0.02)


@pytest.mark.parametrize(
    "moved, operation",
    [
        (3 * 96, lambda: WIDE + OTHER),
        (96 + 24 + 96, lambda: WIDE - ROW.expand(4, 6)),  # a row that is there once
        (2 * 96, lambda: WIDE.mul_(1)),  # read, and written
        (2 * 96, lambda: torch.exp(WIDE, out=OTHER)),  # what is written is not read
        (48 + 96, lambda: OTHER.copy_(HALF)),
        (96, lambda: WIDE.zero_()),
        (96, lambda: torch.zeros(4, 6)),
        (0, lambda: torch.empty(4, 6)),
        (0, lambda: WIDE.view(6, 4).t()[1:].detach()),
        (96 + 16, lambda: WIDE.amax(-1)),
        (32 + 16 + 16, lambda: WIDE.gather(1, COLUMNS)),  # four numbers, not the matrix
        (3 * 96 + 96 + 16, lambda: torch.linalg.vecdot(WIDE, OTHER)),  # a product in memory, then its sums
    ],
)
def test_an_operation_moves_its_inputs_and_outputs(moved: int, operation: Callable[[], object]) -> None:
    with ByteCounter().counting() as traffic:
        operation()
    assert sum(traffic.passes.values()) == moved and not traffic.products


def test_products_are_counted_apart() -> None:
    with ByteCounter().counting() as traffic:
        torch.mm(HALF, HALF.t())
    assert dict(traffic.products) == {"mm": 2 * 48 + 32} and not traffic.passes


@pytest.mark.parametrize(
    "shape, chunk, passes, teacher, expected",
    [
        (0, 512, 174, 2, (1.53, 1.53, 2.88, 0.77, 7.60, 0.70)),
        (0, 512, 40, 0, (1.53, 1.53, 2.88, 0.00, 1.75, 0.70)),
        (0, 4096, 14, 2, (1.53, 1.53, 1.53, 0.77, 0.61, 0.70)),
        (2, 256, 174, 2, (1.88, 1.88, 7.00, 1.54, 14.85, 0.68)),
        (2, 4096, 6, 0, (1.87, 1.87, 1.87, 0.00, 0.51, 0.68)),
    ],
)
def test_the_estimate_is_the_arithmetic_done_by_hand(
    shape: int, chunk: int, passes: float, teacher: float, expected: tuple[float, ...]
) -> None:
    times = head_times(SHAPES[shape], chunk, LogitBytes(passes=passes, student=2, teacher=teacher), H100)
    parts = (times.forward, times.hidden_gradient, times.weight_gradient, times.teacher, times.passes, times.main_grad)
    assert parts == pytest.approx(expected, abs=0.006)
    assert times.total == sum(parts)
