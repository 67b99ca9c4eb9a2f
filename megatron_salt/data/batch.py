"""From the number of consumed samples to the microbatches of one replica.

`Batches` cuts global batches out of the order of `Samples`. The samples of a step, and their order, depend on the consumed count alone:
not on replicas, micro-batch size or restarts. Any rank can read any microbatch, so no rank sends tokens to another. `ReadAhead` reads the
next step's microbatches in a thread while the device works on this step's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from megatron_salt.data.masking import Masking
from megatron_salt.data.samples import Samples
from megatron_salt.data.skip_samples import SkipRanges
from megatron_salt.parallel.device import to_device
from megatron_salt.parallel.layout import context_slice


@dataclass(frozen=True)
class CachedHidden:
    """The teacher's last hidden states of a microbatch, as far as a cache holds them (salt/teacher_cache)."""

    present: np.ndarray
    """bool [b]: which samples the cache holds"""
    hidden: Tensor | None
    """[s/(cp*tp), b, h_t], this rank's share of the sequence, on the CPU; undefined where a sample is not present. None on ranks
    that use no hidden states"""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """The input of one forward pass of one replica: b samples of L tokens. On the CPU until `to_device`."""

    tokens: Tensor
    """int64 [b, L]"""
    labels: Tensor
    """int64 [b, L]: the token after each input token"""
    loss_mask: Tensor
    """float32 [b, L]: 1 where the label counts"""
    position_ids: Tensor
    """int64 [b, L]"""
    documents: Tensor | None
    """int64 [b, L]: index of the token's document in the sample, from 0; None without --reset-attention-mask"""
    sample_ids: np.ndarray
    """int64 [b]: global ids"""
    cached: CachedHidden | None = None
    """None: no sample of the step is in a cache. `to_device` leaves it out"""

    def to_device(self, context_parallel_size: int = 1, cp_rank: int = 0) -> Microbatch:
        """The microbatch on `current_device()`, cut to the positions of a context-parallel rank: [b, L / context_parallel_size].

        `documents` stays whole, because the rank's queries attend to the keys of all ranks.
        """
        parts = context_slice(self.tokens.size(1), context_parallel_size, cp_rank)

        def share(tensor: Tensor) -> Tensor:
            return to_device(tensor if len(parts) == 1 else torch.cat([tensor[:, part] for part in parts], dim=1))

        return Microbatch(
            tokens=share(self.tokens),
            labels=share(self.labels),
            loss_mask=share(self.loss_mask),
            position_ids=share(self.position_ids),
            documents=None if self.documents is None else to_device(self.documents),
            sample_ids=self.sample_ids,
        )


def make_microbatch(sample_ids: np.ndarray, tokens: np.ndarray, masking: Masking) -> Microbatch:
    """A microbatch of these samples: global ids int64 [b], tokens int64 [b, L + 1]."""
    inputs, labels = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    loss_mask, position_ids, documents = masking.of(inputs)
    return Microbatch(
        tokens=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(position_ids),
        documents=None if documents is None else torch.from_numpy(documents),
        sample_ids=sample_ids,
    )


def merge_microbatches(microbatches: Sequence[Microbatch]) -> Microbatch:
    """One microbatch of the samples of several, in their order. All have one length, and all or none have documents."""

    def joined(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    documents = [microbatch.documents for microbatch in microbatches if microbatch.documents is not None]
    return Microbatch(
        tokens=joined(microbatch.tokens for microbatch in microbatches),
        labels=joined(microbatch.labels for microbatch in microbatches),
        loss_mask=joined(microbatch.loss_mask for microbatch in microbatches),
        position_ids=joined(microbatch.position_ids for microbatch in microbatches),
        documents=joined(documents) if documents else None,
        sample_ids=np.concatenate([microbatch.sample_ids for microbatch in microbatches]),
    )


def take_samples(microbatch: Microbatch, rows: np.ndarray) -> Microbatch:
    """A microbatch of these samples of another one, in this order: int [n]."""
    index = torch.from_numpy(rows)
    return Microbatch(
        tokens=microbatch.tokens[index],
        labels=microbatch.labels[index],
        loss_mask=microbatch.loss_mask[index],
        position_ids=microbatch.position_ids[index],
        documents=None if microbatch.documents is None else microbatch.documents[index],
        sample_ids=microbatch.sample_ids[rows],
    )


AddCached = Callable[[list[Microbatch]], list[Microbatch]]
"""Adds `Microbatch.cached` to the microbatches of a step. Called in the thread that reads them."""


class Batches:
    """The share of one data-parallel replica in each global batch.

    Sample j of the global batch (0 <= j < G) belongs to replica j // (G / replicas); a replica's microbatches are
    consecutive slices.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        replica: int,
        num_replicas: int,
        skip: SkipRanges = (),
        since: int = 0,
        end: int | None = None,
        add_cached: AddCached | None = None,
    ) -> None:
        """since: consumed count at which the order of `samples` begins. end: consumed count from which on samples only fill the last
        batch: their loss does not count; None: all count. add_cached: None where there is no cache."""
        assert global_batch_size % (micro_batch_size * num_replicas) == 0, (global_batch_size, micro_batch_size, num_replicas)
        assert 0 <= replica < num_replicas, (replica, num_replicas)
        self.samples = samples
        self._global_batch_size, self._replica, self._num_replicas = global_batch_size, replica, num_replicas
        self.micro_batch_size = micro_batch_size
        self.since = since
        self._share = global_batch_size // num_replicas
        self._first = replica * self._share
        self._skip, self._end, self._add_cached = skip, end, add_cached

    def with_cached(self, add_cached: AddCached) -> Batches:
        """The same, with hidden states of a cache. `in_microbatches_of` and `going_on_with` leave them out again."""
        batches = self._like(self.samples, micro_batch_size=self.micro_batch_size, since=self.since)
        batches._add_cached = add_cached
        return batches

    def in_microbatches_of(self, size: int) -> Batches:
        """The same samples of the same global batches, cut into microbatches of another size."""
        return self._like(self.samples, micro_batch_size=size, since=self.since)

    def going_on_with(self, samples: Samples, since: int) -> Batches:
        """The same, but from the consumed count `since` on it takes the order of other samples from its beginning."""
        return self._like(samples, micro_batch_size=self.micro_batch_size, since=since)

    def _like(self, samples: Samples, *, micro_batch_size: int, since: int) -> Batches:
        return Batches(
            samples,
            global_batch_size=self._global_batch_size,
            micro_batch_size=micro_batch_size,
            replica=self._replica,
            num_replicas=self._num_replicas,
            skip=self._skip,
            since=since,
            end=self._end,
        )

    def position(self, consumed: int) -> int:
        """Position in the order after `consumed` samples: samples drawn plus samples that --skip-samples jumped over."""
        return int(passed_positions(np.array([consumed]), self._skip, self.since)[0])

    def sample_ids(self, consumed: int, count: int) -> np.ndarray:
        """Global ids of the `count` samples, of all replicas, that follow after `consumed` samples: int64 [count]."""
        return self.samples.ids(stream_positions(np.arange(consumed, consumed + count), self._skip, self.since))

    def fetch(self, consumed: int) -> list[Microbatch]:
        """Microbatches of this replica in the step that starts after `consumed` samples."""
        counts = np.arange(consumed + self._first, consumed + self._first + self._share)
        sample_ids, tokens = self.samples.read(stream_positions(counts, self._skip, self.since))
        size, masking = self.micro_batch_size, self.samples.masking
        microbatches = [
            make_microbatch(sample_ids[start : start + size], tokens[start : start + size], masking)
            for start in range(0, self._share, size)
        ]
        if self._end is not None:
            for start, microbatch in zip(range(0, self._share, size), microbatches, strict=True):
                microbatch.loss_mask[torch.from_numpy(counts[start : start + size] >= self._end)] = 0
        return microbatches if self._add_cached is None else self._add_cached(microbatches)

    def first(self, count: int) -> list[Microbatch]:
        """The first `count` samples of the order, one sample a microbatch: the same on every replica, at any consumed count."""
        return first_microbatches(self.samples, count)


def first_microbatches(samples: Samples, count: int) -> list[Microbatch]:
    """The first `count` samples of an order, one sample a microbatch."""
    sample_ids, tokens = samples.read(np.arange(count))
    return [make_microbatch(sample_ids[one : one + 1], tokens[one : one + 1], samples.masking) for one in range(count)]


class ReadAhead:
    """Reads the microbatches of the next step in a thread while the caller works on this step's. Used from one thread.

    Invariant: `fetch` returns what `Batches.fetch` returns, and at most one read is under way. The files are read in the thread alone.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader of the next step")
        self._next: tuple[Batches, int, _Read] | None = None
        self.seconds = 0.0
        """How long the read took whose microbatches `fetch` returned last, also where nobody waited for it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the thread, after the read that is under way. What it read, or an error of it, is dropped."""
        self._thread.shutdown(cancel_futures=True)

    def fetch(self, batches: Batches, consumed: int, then: int | None) -> list[Microbatch]:
        """`batches.fetch(consumed)`; raises what it raises. then: consumed count whose microbatches to begin to read; None: nothing.

        A read that was begun earlier, of something else, is dropped with its errors.
        """
        begun, self._next = self._next, None
        is_this_one = begun is not None and begun[0] is batches and begun[1] == consumed
        read = begun[2] if begun is not None and is_this_one else self._begin(batches, consumed)
        microbatches, self.seconds = read.result()
        if then is not None:
            self._next = batches, then, self._begin(batches, then)
        return microbatches

    def _begin(self, batches: Batches, consumed: int) -> _Read:
        return self._thread.submit(_timed_read, batches, consumed)


_Read = Future[tuple[list[Microbatch], float]]


def _timed_read(batches: Batches, consumed: int) -> tuple[list[Microbatch], float]:
    started = time.perf_counter()
    microbatches = batches.fetch(consumed)
    return microbatches, time.perf_counter() - started


def stream_positions(consumed: np.ndarray, skip: SkipRanges, since: int = 0) -> np.ndarray:
    """Position in the order of the sample that follows each consumed count: int [n] -> int64 [n]. The order begins at count `since`.

    A:B means: when the consumed count, as logged, has reached A, jump over the next B - A samples. So the order before A does not
    change, and the numbers of a later loss spike can be taken from the log as they are.
    """
    return passed_positions(consumed + 1, skip, since) - 1


def passed_positions(consumed: np.ndarray, skip: SkipRanges, since: int = 0) -> np.ndarray:
    """Positions of the order that have passed at each consumed count. Jumps that begin at or after the count are not included."""
    starts = np.array([start for start, _ in skip], np.int64)
    jumped = np.cumsum([0, *(end - start for start, end in skip)], dtype=np.int64)
    of_earlier_orders = jumped[np.searchsorted(starts, since)]
    return consumed - since + jumped[np.searchsorted(starts, consumed)] - of_earlier_orders
