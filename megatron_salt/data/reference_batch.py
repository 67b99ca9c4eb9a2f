"""A batch that never changes; the loss on it identifies the weights of a model.

Every checkpoint records the loss of its model on this batch (`train/evaluate.py`). A run that loads the model as teacher compares:
missing, zeroed or misplaced weights give another loss. Tokens are a pure function of (vocabulary_size, microbatch, position). So the
batch of a shorter context is the beginning of a longer one, and by causality the same holds for its losses. Microbatch j counts only
its first 16 * 4^j positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_salt.data.batch import Microbatch

_FIRST, _GROWTH = 16, 4


def prefix_lengths(seq_length: int) -> list[int]:
    """Number of positions that each microbatch counts: 16, 64, 256, ... below seq_length, and last seq_length. Pure."""
    lengths = []
    length = _FIRST
    while length < seq_length:
        lengths.append(length)
        length *= _GROWTH
    return [*lengths, seq_length]


def fixed_tokens(vocabulary_size: int, microbatch: int, count: int) -> np.ndarray:
    """int64 [count]: ids in [0, vocabulary_size), the same on every machine and for every release of numpy. Pure."""
    generator = np.random.Philox(key=np.array([vocabulary_size, microbatch], np.uint64))
    return (generator.random_raw(count) % np.uint64(vocabulary_size)).astype(np.int64)


def fixed_batch(vocabulary_size: int, seq_length: int, lengths: Sequence[int], multiple_of: int = 1) -> list[Microbatch]:
    """Microbatch j is one sample of seq_length tokens; its first lengths[j] labels count. Attention is plain causal.

    The last microbatch is repeated until their number is a multiple of `multiple_of`. To compare with the record of a checkpoint,
    give those lengths of the record that are at most seq_length. Pure.
    """
    assert lengths and max(lengths) <= seq_length, (lengths, seq_length)
    return [
        _microbatch(vocabulary_size, seq_length, min(number, len(lengths) - 1), lengths)
        for number in range(-(-len(lengths) // multiple_of) * multiple_of)
    ]


def _microbatch(vocabulary_size: int, seq_length: int, number: int, lengths: Sequence[int]) -> Microbatch:
    tokens = torch.from_numpy(fixed_tokens(vocabulary_size, number, seq_length + 1))[None]
    positions = torch.arange(seq_length)[None]
    return Microbatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=(positions < lengths[number]).float(),
        position_ids=positions,
        documents=None,
        sample_ids=np.array([number]),
    )
