"""From the number of consumed samples to this replica's microbatches.

`Samples` is the open data of one split; `Batches` cuts global batches out of it. Which samples a step sees, and in
which order, depends on the consumed count alone: not on replicas, micro-batch size or restarts. Any rank may read any
microbatch, so tokens are never shipped. A sample's global id numbers all windows of all datasets of a split in
--data-path order, held-out ones included: it depends on neither seed, weights nor --valid-share.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from megatron_salt.config import DataConfig, flag
from megatron_salt.data import manifest
from megatron_salt.data.blend import Blend, make_blend, parse_data_path, shares
from megatron_salt.data.order import Progress
from megatron_salt.data.pools import Members, Runs
from megatron_salt.data.scores import DatasetFacts
from megatron_salt.data.windows import TokenFile, Windows
from megatron_salt.errors import UserError

SkipRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass of one replica sees: CPU tensors, b samples of L tokens."""

    tokens: Tensor
    """int64 [b, L]"""
    labels: Tensor
    """int64 [b, L]: the token after each input token"""
    loss_mask: Tensor
    """float32 [b, L]: 1 where the label counts"""
    position_ids: Tensor
    """int64 [b, L]"""
    documents: Tensor | None
    """int64 [b, L]: number of the token's document inside the sample, from 0; None without --reset-attention-mask"""
    sample_ids: np.ndarray
    """int64 [b]: global ids"""


@dataclass(frozen=True)
class Masking:
    """What the end-of-document token means to loss, positions and attention."""

    eod: int | None
    eod_mask_loss: bool
    reset_position_ids: bool
    reset_attention_mask: bool

    def __post_init__(self) -> None:
        for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
            if getattr(self, name) and self.eod is None:
                raise UserError(f"{flag(name)} needs an end-of-document token, and the tokenizer has none")

    def of(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(loss mask float32, position ids int64, documents int64 or None), each of the shape of `tokens`, int64 [b, L].

        Megatron's meanings (megatron/core/datasets/gpt_dataset.py): an end-of-document token is the last of its document; with
        --eod-mask-loss no loss is taken where it is the input.
        """
        loss_mask = np.ones(tokens.shape, np.float32)
        position_ids = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if not (self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask):
            return loss_mask, position_ids.copy(), None
        is_eod = tokens == self.eod
        if self.eod_mask_loss:
            loss_mask[is_eod] = 0.0
        if self.reset_position_ids:
            starts = np.zeros(tokens.shape, np.int64)  # first position of the token's document
            starts[:, 1:] = np.maximum.accumulate(np.where(is_eod, position_ids + 1, 0), axis=1)[:, :-1]
            position_ids = position_ids - starts
        documents = np.cumsum(is_eod, axis=1) - is_eod if self.reset_attention_mask else None
        return loss_mask, np.ascontiguousarray(position_ids), documents


class Samples:
    """The open data of one split: windows of one or more datasets, in an endless order."""

    def __init__(
        self,
        split: str,
        windows: Sequence[Windows],
        first: Sequence[int],
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        seed: int,
        masking: Masking,
        vocabulary_size: int,
        verify: bool,
    ) -> None:
        """Dataset d contributes its windows [first[d], first[d] + sizes[d]). Token ids must be below `vocabulary_size`."""
        self.split = split
        self.windows = list(windows)
        self.masking = masking
        self.first = list(first)
        """Of each dataset, the first window of this split."""
        self.sizes = list(sizes)
        """Of each dataset, how many windows of it this split has."""
        self._weights = None if weights is None else list(weights)
        self._seed = seed
        self._offsets = np.cumsum([0, *(len(w) for w in self.windows)], dtype=np.int64)
        self._draw_from(split, self.runs)
        self.vocabulary_size = vocabulary_size
        """Ids of the tokenizer."""
        self._verify = verify

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def weighted(self) -> bool:
        """Whether each dataset is a pool of its own, with its weight; else all of them are one."""
        return self._weights is not None

    @property
    def runs(self) -> list[Runs]:
        """All samples of this split, by pool."""
        runs = [(int(offset) + first, size) for offset, first, size in zip(self._offsets, self.first, self.sizes, strict=False)]
        if self.weighted:
            return [Runs((first,), (size,)) for first, size in runs]
        return [Runs(tuple(first for first, _ in runs), tuple(size for _, size in runs))]

    @property
    def num_members(self) -> int:
        """Samples that the order draws from: all of the split, or fewer."""
        return sum(pool.size for pool in self.members)

    def drawing_from(self, order: str, members: Sequence[Members]) -> Self:
        """The same data in an order of its own, and of each pool these samples alone. order: its name, which chooses it."""
        other = copy(self)
        other._draw_from(order, members)
        return other

    def _draw_from(self, order: str, members: Sequence[Members]) -> None:
        self.members = list(members)
        self.blend: Blend = make_blend(order, [pool.size for pool in members], self._weights, self._seed)

    @cached_property
    def fingerprint(self) -> str:
        """Names the tokens, their cut into samples, weights and split; equal for equal data under other paths.

        Reads sampled blocks of each dataset, with --verify-data every byte: call it on one rank.
        """
        facts = {
            "split": self.split,
            "seq_length": self.windows[0].seq_length,
            "shares": None if self._weights is None else shares(self._weights),
            "datasets": [manifest.fingerprint(w.file.prefix, verify=self._verify) for w in self.windows],
            "first": self.first,
            "sizes": self.sizes,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        datasets = f"{len(self.windows)} dataset{'s' if len(self.windows) > 1 else ''}"
        return f"{digest} ({self.split}: {len(self)} samples of --seq-length {facts['seq_length']} from {datasets})"

    def dataset_facts(self) -> tuple[DatasetFacts, ...]:
        """What scores and selections know the datasets by, held-out windows included. Reads as much as `fingerprint` does."""
        return tuple(
            DatasetFacts(windows.file.prefix, manifest.fingerprint(windows.file.prefix, verify=self._verify), len(windows))
            for windows in self.windows
        )

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Global sample ids at these positions of the order: int [n] -> int64 [n]."""
        pool, number = self.blend.locate(positions)
        if len(self.members) == 1:
            return self.members[0].ids(number)
        ids = np.empty_like(number)
        for index in np.unique(pool).tolist():
            here = pool == index
            ids[here] = self.members[index].ids(number[here])
        return ids

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, window in its file) of global ids: int64 [n] -> int64 [n], int64 [n]."""
        assert sample_ids.size == 0 or (sample_ids.min() >= 0 and sample_ids.max() < self._offsets[-1]), (
            sample_ids,
            self._offsets[-1],
        )
        dataset = np.searchsorted(self._offsets, sample_ids, side="right") - 1
        return dataset, sample_ids - self._offsets[dataset]

    def tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [n] global ids -> int64 [n, L + 1]. UserError if a token is not in the vocabulary."""
        dataset, window = self.locate(sample_ids)
        tokens = np.empty((len(sample_ids), self.windows[0].seq_length + 1), np.int64)
        for index in np.unique(dataset).tolist():
            here = dataset == index
            tokens[here] = self.windows[index].read_many(window[here])
        if tokens.size and (tokens.max() >= self.vocabulary_size or tokens.min() < 0):
            self._refuse(tokens, dataset, window)
        return tokens

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(global sample ids int64 [n], tokens int64 [n, L + 1]) at these positions of the order, int [n]."""
        sample_ids = self.ids(positions)
        return sample_ids, self.tokens(sample_ids)

    def progress(self, position: int) -> list[Progress]:
        """Where each pool stands after the first `position` samples of the order."""
        return self.blend.progress(position)

    def repeats(self, num_samples: int) -> str | None:
        """What to tell the user if `num_samples` samples are more than there are, else None."""
        names = [w.file.prefix for w in self.windows] if self.weighted else [f"the {self.split} data"]
        told = [
            f"{num_samples} samples take {pool.drawn} from {name}, which has {pool.size}: "
            f"{pool.num_repeats} are repeats, the last in epoch {(pool.drawn - 1) // pool.size + 1}"
            for name, pool in zip(names, self.progress(num_samples), strict=True)
            if pool.num_repeats
        ]
        return "; ".join(told) or None

    def _refuse(self, tokens: np.ndarray, dataset: np.ndarray, window: np.ndarray) -> None:
        row, column = np.argwhere((tokens >= self.vocabulary_size) | (tokens < 0))[0]
        file = self.windows[dataset[row]].file
        raise UserError(
            f"{file.flag} {file.prefix}: token id {tokens[row, column]} at window {window[row]}, token {column} of it, is not "
            f"in the vocabulary of {self.vocabulary_size}; was {file.prefix}.bin made with this --tokenizer-type?"
        )


class Batches:
    """The share of one data-parallel replica in each global batch.

    Sample j of the global batch (0 <= j < G) belongs to replica j // (G / replicas); a replica's microbatches are
    consecutive slices.
    """

    def __init__(
        self,
        samples: Samples,
        global_batch_size: int,
        micro_batch_size: int,
        replica: int,
        num_replicas: int,
        skip: SkipRanges = (),
        since: int = 0,
    ) -> None:
        """since: the consumed count at which the order of `samples` begins."""
        assert global_batch_size % (micro_batch_size * num_replicas) == 0, (global_batch_size, micro_batch_size, num_replicas)
        assert 0 <= replica < num_replicas, (replica, num_replicas)
        self.samples = samples
        self._of = (global_batch_size, replica, num_replicas, skip)
        self.micro_batch_size = micro_batch_size
        self.since = since
        self._share = global_batch_size // num_replicas
        self._first = replica * self._share
        self._skip = skip

    def in_microbatches_of(self, size: int) -> Batches:
        """The same samples of the same global batches, cut into microbatches of another size."""
        global_batch_size, replica, num_replicas, skip = self._of
        return Batches(self.samples, global_batch_size, size, replica, num_replicas, skip, self.since)

    def going_on_with(self, samples: Samples, since: int) -> Batches:
        """From the consumed count `since` on the order of other samples, from its beginning."""
        global_batch_size, replica, num_replicas, skip = self._of
        return Batches(samples, global_batch_size, self.micro_batch_size, replica, num_replicas, skip, since)

    def position(self, consumed: int) -> int:
        """How much of the order has passed when the count stands at `consumed`: samples drawn, and those jumped over on the way."""
        return int(passed_positions(np.array([consumed]), self._skip, self.since)[0])

    def fetch(self, consumed: int) -> list[Microbatch]:
        """This replica's microbatches of the step that starts after `consumed` samples."""
        counts = np.arange(consumed + self._first, consumed + self._first + self._share)
        sample_ids, tokens = self.samples.read(stream_positions(counts, self._skip, self.since))
        size = self.micro_batch_size
        return [
            self._microbatch(sample_ids[start : start + size], tokens[start : start + size]) for start in range(0, self._share, size)
        ]

    def _microbatch(self, sample_ids: np.ndarray, tokens: np.ndarray) -> Microbatch:
        inputs, labels = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        loss_mask, position_ids, documents = self.samples.masking.of(inputs)
        return Microbatch(
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            torch.from_numpy(loss_mask),
            torch.from_numpy(position_ids),
            None if documents is None else torch.from_numpy(documents),
            sample_ids,
        )


def parse_skip_samples(values: Sequence[str]) -> SkipRanges:
    """`A:B` strings -> ((A, B), ...) in ascending order; UserError naming --skip-samples."""
    ranges = []
    for value in values:
        start, colon, end = value.partition(":")
        if not (colon and start.isascii() and start.isdigit() and end.isascii() and end.isdigit() and int(start) < int(end)):
            raise UserError(f"--skip-samples takes A:B with whole numbers 0 <= A < B, such as 51200:56320, got {value}")
        ranges.append((int(start), int(end)))
    ranges.sort()
    for one, other in itertools.pairwise(ranges):
        if one[0] == other[0]:
            raise UserError(f"--skip-samples {one[0]}:{one[1]} and {other[0]}:{other[1]} start at the same sample; give one")
    return tuple(ranges)


def stream_positions(consumed: np.ndarray, skip: SkipRanges, since: int = 0) -> np.ndarray:
    """Position in the order of the sample that each consumed count (int [n]) takes -> int64 [n]. The order begins at `since`.

    A:B means: when the consumed count, as logged, has reached A, jump over the next B - A samples. So the
    order before A stays what it was, and the numbers of a later spike can be given as the log shows them.
    """
    return passed_positions(consumed + 1, skip, since) - 1


def passed_positions(consumed: np.ndarray, skip: SkipRanges, since: int = 0) -> np.ndarray:
    """Positions from the order's beginning to the last one that each consumed count has taken; jumps at or after it do not count."""
    starts = np.array([start for start, _ in skip], np.int64)
    jumped = np.cumsum([0, *(end - start for start, end in skip)], dtype=np.int64)
    of_earlier_orders = jumped[np.searchsorted(starts, since)]
    return consumed - since + jumped[np.searchsorted(starts, consumed)] - of_earlier_orders


def open_training_data(
    data: DataConfig, seq_length: int, seed: int, tokenizer_vocab_size: int, eod: int | None
) -> tuple[Samples, Samples | None]:
    """(training samples, held-out samples or None). Every rank calls; O(1) in the size of the data.

    UserError, by flag, file and numbers, for data that cannot be used.
    Held-out data has one order, whatever the seed: each evaluation that starts at 0 sees the same windows.
    """
    masking = Masking(eod, data.eod_mask_loss, data.reset_position_ids, data.reset_attention_mask)

    def samples(
        split: str, windows: list[Windows], first: list[int], sizes: list[int], weights: list[float] | None, seed: int
    ) -> Samples:
        return Samples(split, windows, first, sizes, weights, seed, masking, tokenizer_vocab_size, data.verify_data)

    windows, weights = _open_windows(data.data_path, "--data-path", seq_length)
    held_out = [_held_out(w, data.valid_share) for w in windows]
    kept = [len(w) - count for w, count in zip(windows, held_out, strict=True)]
    train = samples("train", windows, [0] * len(windows), kept, weights, seed)
    if data.valid_data_path:
        valid_windows, valid_weights = _open_windows(data.valid_data_path, "--valid-data-path", seq_length)
        return train, samples(
            "valid", valid_windows, [0] * len(valid_windows), [len(w) for w in valid_windows], valid_weights, seed=0
        )
    return train, samples("valid", windows, kept, held_out, weights, seed=0) if data.valid_share else None


def _open_windows(data_path: Sequence[str], flag_name: str, seq_length: int) -> tuple[list[Windows], list[float] | None]:
    prefixes, weights = parse_data_path(data_path, flag_name)
    return [Windows(TokenFile.open(prefix, flag_name), seq_length) for prefix in prefixes], weights


def _held_out(windows: Windows, valid_share: float) -> int:
    """How many of a dataset's last windows are held out."""
    if not valid_share:
        return 0
    if len(windows) < 2:
        raise UserError(
            f"--valid-share {valid_share}: {windows.file.prefix} has {len(windows)} window of --seq-length "
            f"{windows.seq_length}; at least one must remain for training and one be held out"
        )
    return max(1, int(len(windows) * valid_share))
