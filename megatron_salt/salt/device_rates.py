"""The rates of this process's device, for the predicted cost of stage 1: from the table of GPUs, from flags, or measured on a CPU.

A CPU's rates depend on the width of a product and on caches, so they are measured at the sizes of the run: a product of the layers
and one of the head for each model, the student's with those of their backward passes, and the passes over the head's logits. Each counts
by its fastest call. That takes at most half a second, on every rank at the same time, as they train. Nothing is exchanged, and the run's
random numbers stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_salt.cards import Products, Rates, reached
from megatron_salt.config import LoggingConfig, flag
from megatron_salt.model import matrix_products
from megatron_salt.model.kernels.passes import Blocks, into_gradient, row_sums
from megatron_salt.parallel.device import current_device
from megatron_salt.salt.cost import ModelRates, rates_of_gpu
from megatron_salt.salt.head_cost import HeadShape, pass_bytes

_SECONDS, _FEWEST, _MOST = 0.05, 2, 10
"""Of each measurement: its time, and calls whatever they take and at most."""
_LOGITS, _TOKENS, _HIDDEN, _WIDTH = 1 << 20, 256, 1024, 2048
"""Largest sizes that are measured. Products beyond them are no faster."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The first product of an MLP on one rank, [tokens, hidden] x [hidden, width], and its number format."""

    hidden: int
    width: int
    products: Products


def find_rates(flags: LoggingConfig, student: LayerShape, teacher: LayerShape, head: HeadShape) -> ModelRates:
    """Rates of both models on this device. Takes at most half a second on a CPU, no time on a GPU. Not collective."""
    device = current_device()
    if device.type == "cuda":
        return rates_of_gpu(torch.cuda.get_device_name(device), flags, student.products, teacher.products, head.itemsize)
    if flags.device_peak_tflops is not None and flags.device_peak_gb_per_s is not None:
        return rates_of_gpu("this CPU", flags, student.products, teacher.products, head.itemsize)
    return _replaced(measure(student, teacher, head), flags)


def _replaced(measured: ModelRates, flags: LoggingConfig) -> ModelRates:
    """What was measured, with the one figure that a flag gives in its place."""
    given = [name for name in ("device_peak_tflops", "device_peak_gb_per_s") if getattr(flags, name) is not None]
    if not given:
        return measured

    def with_flag(rates: Rates) -> Rates:
        by_flag = reached(flags.device_peak_tflops or 0, flags.device_peak_gb_per_s or 0)
        return Rates(by_flag.flops or rates.flops, by_flag.bytes or rates.bytes)

    return ModelRates(
        layers=with_flag(measured.layers), head=with_flag(measured.head), teacher_layers=with_flag(measured.teacher_layers),
        teacher_head=with_flag(measured.teacher_head), source=f"{measured.source}, in part replaced by {flag(given[0])}",
    )  # fmt: skip


def measure(student: LayerShape, teacher: LayerShape, head: HeadShape) -> ModelRates:
    """Measure this CPU. Nothing random is drawn."""
    dtype = torch.bfloat16 if head.itemsize == 2 else torch.float32
    moved = _pass_rate(head, dtype)
    layers = _training_rate(head.tokens, student.hidden, student.width, dtype)
    of_head = _training_rate(head.tokens, head.hidden, head.rows, dtype)
    teacher_layers = _product_rate(head.tokens, teacher.hidden, teacher.width, dtype, dtype)
    of_teacher = _product_rate(head.tokens, head.teacher_hidden, head.rows, dtype, torch.float32)
    return ModelRates(
        layers=Rates(layers, moved), head=Rates(of_head, moved), teacher_layers=Rates(teacher_layers, moved),
        teacher_head=Rates(of_teacher, moved),
        source=f"measured on this CPU: {layers / 1e9:.0f} GFLOP/s in the student's layers, {teacher_layers / 1e9:.0f} in the "
        f"teacher's, {of_head / 1e9:.0f} in the head, {moved / 1e9:.1f} GB/s",
    )  # fmt: skip


def _product_rate(tokens: int, hidden: int, width: int, dtype: torch.dtype, result: torch.dtype) -> float:
    """FLOP/s of a product of these sizes, or of the largest that are measured, in a CPU's form of it. result: dtype of its result."""
    left, right = _operands(tokens, hidden, width, dtype)
    out = torch.empty((left.size(0), right.size(0)), dtype=result)
    return 2.0 * left.numel() * right.size(0) / _fastest(lambda: matrix_products.logits(left, right, out))


def _training_rate(tokens: int, hidden: int, width: int, dtype: torch.dtype) -> float:
    """FLOP/s of such a product and the two of its backward pass, whose operands lie otherwise; a CPU may be slower at them."""
    left, right = _operands(tokens, hidden, width, dtype)
    out = torch.zeros((left.size(0), right.size(0)), dtype=dtype)
    d_left, d_right = torch.empty_like(left), torch.zeros(right.shape)

    def work() -> None:
        matrix_products.logits(left, right, out)
        matrix_products.hidden_gradient(out, right, d_left)
        if dtype == torch.float32:
            d_right.addmm_(out.t(), left)
        else:
            matrix_products.add_weight_gradient(d_right, out, left)

    return 3 * 2.0 * left.numel() * right.size(0) / _fastest(work)


def _operands(tokens: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[tokens, hidden] and [width, hidden], at most as large as is measured."""
    sizes = (min(tokens, _TOKENS), min(hidden, _HIDDEN)), (min(width, _WIDTH), min(hidden, _HIDDEN))
    return torch.full(sizes[0], 0.5, dtype=dtype), torch.full(sizes[1], 0.5, dtype=dtype)


def _pass_rate(head: HeadShape, dtype: torch.dtype) -> float:
    """Bytes/s of the passes over one block of logits, with a teacher and without."""
    rows = min(head.rows, _LOGITS)
    tokens = max(1, min(head.tokens, head.chunk_tokens, _LOGITS // rows))
    logits, teacher = torch.zeros((tokens, rows), dtype=dtype), torch.zeros(tokens, rows)
    labels, numbers = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    blocks, temperature = Blocks.of(logits), 0.5 if head.tempered else 1.0

    def plain() -> None:
        row_sums(logits, None, labels, 1.0, False, blocks)
        into_gradient(logits, None, labels, numbers, numbers, None, None, 1.0, blocks)

    def taught() -> None:
        row_sums(logits, teacher, labels, temperature, False, blocks)
        into_gradient(logits, teacher, labels, numbers, numbers, numbers, numbers, temperature, blocks)

    moved = tokens * rows * (pass_bytes(head, False) + pass_bytes(head, True))
    return moved / (_fastest(plain) + _fastest(taught))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls after one that warms up, CPU or wall-clock time, whichever is less: the first leaves out waits
    for other programs, the second does not count the threads of one call."""
    work()
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) < _FEWEST or (len(seconds) < _MOST and time.perf_counter() < end):
        wall, busy = time.perf_counter(), time.process_time()
        work()
        seconds.append(min(time.perf_counter() - wall, time.process_time() - busy))
    return max(min(seconds), 1e-9)
