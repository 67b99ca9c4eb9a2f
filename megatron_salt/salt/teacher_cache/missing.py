"""Which samples of a step the teacher computes, where a cache holds the others, and how both are joined.

The samples that are missing are packed into microbatches of the usual size, in their order; the last one of them fills the rest. Where the
cache holds all samples of a forward pass or none, as in a run that repeats the order of the one that wrote, a forward pass has the samples
that it has without a cache, and their hidden states the same bits. Else a sample may be computed in other company; that is the same up to
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from megatron_salt.data.batch import CachedHidden, Microbatch, merge_microbatches, take_samples
from megatron_salt.parallel.device import to_device


def rows_to_compute(present: np.ndarray, forward_samples: int) -> np.ndarray:
    """Numbers of the samples of a step that the teacher computes: bool [n] -> int64 [m], m a multiple of `forward_samples`. Pure."""
    missing = np.flatnonzero(~present)
    return np.concatenate([missing, np.repeat(missing[-1:], -len(missing) % forward_samples)])


def num_computed(present: np.ndarray, replicas: int, forward_samples: int) -> int:
    """Samples that the teachers of all replicas compute in a step: bool [global batch]. Pure."""
    return sum(len(rows_to_compute(of_replica, forward_samples)) for of_replica in present.reshape(replicas, -1))


def presence(microbatches: Sequence[Microbatch]) -> np.ndarray:
    """Which samples of a replica's step the cache holds: bool [n]. The same on all ranks of a block."""
    return np.concatenate(
        [np.zeros(len(one.sample_ids), bool) if one.cached is None else one.cached.present for one in microbatches]
    )


def missing_microbatches(microbatches: Sequence[Microbatch], rows: np.ndarray) -> list[Microbatch]:
    """The samples with these numbers in microbatches of the usual size. rows: of `rows_to_compute`."""
    every, size = merge_microbatches(microbatches), len(microbatches[0].sample_ids)
    return [take_samples(every, rows[first : first + size]) for first in range(0, len(rows), size)]


def join(cached: CachedHidden, first: int, rows: np.ndarray, computed: Sequence[Tensor | None]) -> Tensor | None:
    """The hidden states of one microbatch on this rank's device: [s/(cp*tp), b, h_t]; None on ranks that use none.

    first: number in the step of its first sample. computed: for each of `missing_microbatches`.
    """
    if cached.hidden is None:
        return None
    hidden = to_device(cached.hidden)
    if not cached.present.all():
        hidden = hidden.clone() if hidden is cached.hidden else hidden  # the microbatch does not change
    size = len(cached.present)
    for column in np.flatnonzero(~cached.present).tolist():
        forward, at = divmod(int(np.searchsorted(rows, first + column)), size)
        source = computed[forward]
        assert source is not None, "the teacher's hidden states come to the ranks that use them"
        hidden[:, column].copy_(source[:, at])
    return hidden
