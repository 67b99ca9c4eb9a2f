"""Measure the output head's work beside its matrix products, at start-up.

Softmaxes, metrics and the gradient over the logits do little arithmetic on much memory, so a count of FLOPs leaves them out. With a small
model, or on a fast device, they are a good part of the head's time. The head's own function is timed at a hidden width so small that its
products take almost no time. The result is given in FLOPs: what the device multiplies in the same time. Only the predicted cost of
stage 1 (`cost.py`) uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.model import matrix_products
from megatron_salt.model.flops import HeadCost
from megatron_salt.model.loss import SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.device import current_device

_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}
_ROWS, _NARROW, _WIDE, _REPEATS = 32768, 8, 1024, 3


def measure_head(dtype: torch.dtype, rows: int, hidden_size: int, chunk_tokens: int, alone: dist.ProcessGroup) -> HeadCost:
    """Time a chunk of at most 2**20 logits (2**25 on a GPU) three times; the fastest counts. Under half a second on a CPU core.
    Collective over all ranks: all measure at the same time, as they train, and all get the mean. The run's random numbers stay as they are.

    rows: rows of the output weight on a rank. alone: a process group of this rank only.
    """
    device = current_device()
    rows = max(1, min(rows, _ROWS))
    tokens = max(1, min(chunk_tokens, _LOGITS[device.type] // rows))
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    hidden, weight = drawn(tokens, 1, _NARROW).requires_grad_(), drawn(rows, _NARROW).requires_grad_()
    labels, mask = torch.zeros(tokens, dtype=torch.int64, device=device), torch.ones(tokens, device=device)
    shard = VocabularyShard(alone, rows, rows, sequence_parallel=False)
    teacher = SoftTarget(drawn(tokens, 1, _NARROW), drawn(rows, _NARROW), temperature=1.0, kd_weight=0.5)
    width = min(hidden_size, _WIDE)
    wide, wide_weight, logits = drawn(tokens, width), drawn(rows, width), torch.empty(tokens, rows, dtype=dtype, device=device)

    def head(soft: SoftTarget | None) -> Callable[[], object]:
        return lambda: fused_linear_cross_entropy(hidden, weight, labels, mask, shard, tokens, soft)

    seconds = [
        _fastest(head(None)),
        _fastest(head(teacher)),
        _fastest(lambda: matrix_products.logits(wide, wide_weight, logits)),
    ]
    mean = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(mean)
    plain, distilled, product = (mean / dist.get_world_size()).tolist()
    flops_per_second = 2 * tokens * rows * width / product
    return HeadCost(*(taken / (tokens * rows) * flops_per_second for taken in (plain, distilled)))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that warms up. On a CPU these are seconds of the process, not of the clock."""
    seconds = []
    for _ in range(1 + _REPEATS):
        start = _now()
        work()
        seconds.append(_now() - start)
    return min(seconds[1:])


def _now() -> float:
    if current_device().type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
