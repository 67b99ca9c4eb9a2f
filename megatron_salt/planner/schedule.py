"""The order of forward and backward passes on one pipeline rank, as megatron-core's schedules run them. Pure.

1F1B and its interleaved form (0.16.1 and 0.19.2, `pipeline_parallel/schedules.py`): some forward passes to warm up, then one forward and
one backward pass in turn, then the backward passes that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ENOUGH = 3
"""Rounds of all stages and chunks after which a schedule only repeats itself."""


@dataclass(frozen=True)
class Pass:
    """One pass of one microbatch through one model chunk."""

    kind: Literal["forward", "backward"]
    chunk: int


def counted_microbatches(stages: int, chunks: int, num_microbatches: int) -> int:
    """So many microbatches of a step that every number of passes in flight occurs."""
    counted = min(num_microbatches, ENOUGH * stages * chunks)
    return -(-counted // stages) * stages if chunks > 1 else counted


def passes(stage: int, stages: int, chunks: int, num_microbatches: int) -> list[Pass]:
    """The passes of a step on pipeline rank `stage` of `stages`, with `chunks` model chunks on each rank.

    Of a step with very many microbatches only `counted_microbatches` are listed.
    """
    return all_passes(stage, stages, chunks, counted_microbatches(stages, chunks, num_microbatches))


def all_passes(stage: int, stages: int, chunks: int, num_microbatches: int) -> list[Pass]:
    """The passes of a whole step. With several chunks `num_microbatches` is a multiple of `stages`."""
    total = num_microbatches * chunks
    if stages == 1:
        warm = 0
    elif chunks == 1:
        warm = stages - stage - 1
    else:
        warm = (stages - stage - 1) * 2 + (chunks - 1) * stages
    warm = min(warm, total)
    order = [Pass("forward", _chunk(number, stages, chunks)) for number in range(warm)]
    for number in range(total - warm):
        order.append(Pass("forward", _chunk(warm + number, stages, chunks)))
        order.append(Pass("backward", chunks - 1 - _chunk(number, stages, chunks)))
    order += [Pass("backward", chunks - 1 - _chunk(number, stages, chunks)) for number in range(total - warm, total)]
    return order


def _chunk(number: int, stages: int, chunks: int) -> int:
    """The chunk of the `number`-th forward pass of a rank: each chunk takes as many microbatches in a row as there are stages."""
    return number // stages % chunks
