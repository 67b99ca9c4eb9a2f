"""A batch that never changes, by whose loss a model is recognised.

Every checkpoint records its model's loss on it (`train/evaluate.py`), and a run that takes the model as its teacher compares: weights
that arrived half, or zeroed, or in the wrong place give another loss. Tokens are a pure function of (vocabulary_size, microbatch,
position), so the batch of a shorter context is the beginning of the longer one's, and by causality so are its losses: microbatch
j counts its first 16 * 4^j positions alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_salt.data.batch import Microbatch

_FIRST, _GROWTH = 16, 4


def prefix_lengths(seq_length: int) -> list[int]:
    """How many positions each microbatch counts: 16, 64, 256, ... below seq_length, and last seq_length itself. Pure."""
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
    """Microbatch j is one sample of seq_length tokens of which the first lengths[j] count; plain causal attention.

    The last one is repeated until their number is a multiple of `multiple_of`. To compare with a checkpoint's record give the
    lengths of the record that are at most seq_length, from the first on. Pure.
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
