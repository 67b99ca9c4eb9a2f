"""The open data of one split: numbered windows of one or more datasets, in an endless order.

The global id of a sample numbers all windows of all datasets in --data-path order, held-out ones included. It does not depend on seed,
weights or --valid-share. `subsets.py` says which samples an order draws from, `batch.py` how steps cut the order. The cost of opening
does not grow with the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Self

import numpy as np

from megatron_salt.config import DataConfig
from megatron_salt.data import manifest
from megatron_salt.data.blend import VALID, Blend, make_blend, parse_data_path, parse_valid_data_path, shares
from megatron_salt.data.duplicate_inputs import refuse_repeated_datasets
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.manifest import DatasetFacts
from megatron_salt.data.masking import Masking
from megatron_salt.data.order import PoolProgress
from megatron_salt.data.subsets import IdRanges, Members
from megatron_salt.data.windows import Windows, first_ids, locate, num_held_out
from megatron_salt.errors import UserError


class Samples:
    """The open data of one split: windows of one or more datasets, in an endless order."""

    def __init__(
        self,
        split: str,
        *,
        windows: Sequence[Windows],
        first: Sequence[int],
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        seed: int,
        masking: Masking,
        vocabulary_size: int,
        verify: bool,
    ) -> None:
        """Dataset d gives its windows [first[d], first[d] + sizes[d]). Token ids must be below `vocabulary_size`."""
        self.split = split
        self.windows = list(windows)
        self.masking = masking
        self.first = list(first)
        """First window of this split, for each dataset."""
        self.sizes = list(sizes)
        """Number of windows in this split, for each dataset."""
        self._weights = None if weights is None else list(weights)
        self._seed = seed
        self.first_ids = first_ids(len(w) for w in self.windows)
        """int64 [datasets + 1]: the id of each dataset's first window, and the number of all windows."""
        self._draw_from(split, self.id_ranges)
        self.vocabulary_size = vocabulary_size
        """Ids of the tokenizer."""
        self._verify = verify

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def weighted(self) -> bool:
        """Whether each dataset is a pool of its own, with a weight. Otherwise all datasets are one pool."""
        return self._weights is not None

    @property
    def id_ranges(self) -> list[IdRanges]:
        """Ids of all samples of this split, for each pool."""
        ranges = [
            (int(offset) + first, size) for offset, first, size in zip(self.first_ids, self.first, self.sizes, strict=False)
        ]
        if self.weighted:
            return [IdRanges((first,), (size,)) for first, size in ranges]
        return [IdRanges(tuple(first for first, _ in ranges), tuple(size for _, size in ranges))]

    @property
    def num_members(self) -> int:
        """Number of samples that the order draws from: all of the split, or fewer."""
        return sum(pool.size for pool in self.members)

    def drawing_from(self, order: str, members: Sequence[Members]) -> Self:
        """The same data in another order, drawing only from these samples of each pool. order: a name, which determines the order."""
        other = copy(self)
        other._draw_from(order, members)
        return other

    def _draw_from(self, order: str, members: Sequence[Members]) -> None:
        self.members = list(members)
        self.blend: Blend = make_blend(order, [pool.size for pool in members], self._weights, self._seed)

    @cached_property
    def fingerprint(self) -> str:
        """Names the tokens, how they are cut into samples, the weights and the split. Paths do not count.

        Reads sampled blocks of each dataset, or every byte with --verify-data: call it on one rank.
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
        """Facts by which scores and selections recognise the datasets. Reads as much as `fingerprint` does."""
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
            in_pool = pool == index
            ids[in_pool] = self.members[index].ids(number[in_pool])
        return ids

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, window in its file) of global ids: int64 [n] -> int64 [n], int64 [n]."""
        assert sample_ids.size == 0 or (sample_ids.min() >= 0 and sample_ids.max() < self.first_ids[-1]), (
            sample_ids,
            self.first_ids[-1],
        )
        return locate(self.first_ids, sample_ids)

    def tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        """Tokens of samples: global ids int64 [n] -> int64 [n, L + 1]. UserError if a token is not in the vocabulary."""
        dataset, window = self.locate(sample_ids)
        tokens = np.empty((len(sample_ids), self.windows[0].seq_length + 1), np.int64)
        for index in np.unique(dataset).tolist():
            in_dataset = dataset == index
            tokens[in_dataset] = self.windows[index].read_many(window[in_dataset])
        if tokens.size and (tokens.max() >= self.vocabulary_size or tokens.min() < 0):
            self._refuse(tokens, dataset, window)
        return tokens

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(global sample ids int64 [n], tokens int64 [n, L + 1]) at these positions of the order, int [n]."""
        sample_ids = self.ids(positions)
        return sample_ids, self.tokens(sample_ids)

    def progress(self, position: int) -> list[PoolProgress]:
        """How much of each pool the first `position` samples of the order have drawn."""
        return self.blend.progress(position)

    def repeats(self, num_samples: int) -> str | None:
        """A message if `num_samples` samples visit some samples again, else None."""
        names = [w.file.prefix for w in self.windows] if self.weighted else [f"the {self.split} data"]
        messages = [
            f"{num_samples} samples take {pool.drawn} from {name}, which has {pool.size}: "
            f"{pool.num_repeats} are repeats, the last in epoch {(pool.drawn - 1) // pool.size + 1}"
            for name, pool in zip(names, self.progress(num_samples), strict=True)
            if pool.num_repeats
        ]
        return "; ".join(messages) or None

    def _refuse(self, tokens: np.ndarray, dataset: np.ndarray, window: np.ndarray) -> None:
        row, column = np.argwhere((tokens >= self.vocabulary_size) | (tokens < 0))[0]
        file = self.windows[dataset[row]].file
        raise UserError(
            f"{file.flag} {file.prefix}: token id {tokens[row, column]} at window {window[row]}, token {column} of it, is not "
            f"in the vocabulary of {self.vocabulary_size}; was {file.prefix}.bin made with this --tokenizer-type?"
        )


def open_training_data(
    data: DataConfig, seq_length: int, seed: int, vocabulary_size: int, eod: int | None
) -> tuple[Samples, dict[str, Samples]]:
    """(training samples, {name: held-out samples}). Every rank calls it; the cost does not grow with the data.

    UserError, with flag, file and numbers, for data that cannot be used. Held-out data has one order for all seeds: every evaluation
    that starts at 0 sees the same windows. Names: see `parse_valid_data_path`; "valid" for --valid-share.
    """
    masking = Masking(eod, data.eod_mask_loss, data.reset_position_ids, data.reset_attention_mask)

    def split(
        name: str, windows: list[Windows], *, first: list[int], sizes: list[int], weights: list[float] | None, seed: int
    ) -> Samples:
        return Samples(
            name,
            windows=windows,
            first=first,
            sizes=sizes,
            weights=weights,
            seed=seed,
            masking=masking,
            vocabulary_size=vocabulary_size,
            verify=data.verify_data,
        )

    windows, weights = _open_windows(data.data_path, "--data-path", seq_length, data.allow_duplicate_inputs)
    held_out = [num_held_out(len(w), data.valid_share, w.file.prefix, seq_length) for w in windows]
    kept = [len(w) - count for w, count in zip(windows, held_out, strict=True)]
    train = split("train", windows, first=[0] * len(windows), sizes=kept, weights=weights, seed=seed)
    if data.valid_share:
        return train, {VALID: split(VALID, windows, first=kept, sizes=held_out, weights=weights, seed=0)}
    valid = {}
    for name, words in parse_valid_data_path(data.valid_data_path).items():
        windows, weights = _open_windows(words, "--valid-data-path", seq_length, data.allow_duplicate_inputs)
        sizes = [len(w) for w in windows]
        valid[name] = split(name, windows, first=[0] * len(windows), sizes=sizes, weights=weights, seed=0)
    return train, valid


def open_samples(
    prefix: str, flag_name: str, data: DataConfig, seq_length: int, vocabulary_size: int, eod: int | None
) -> Samples:
    """All windows of one dataset, each once, masked as `data` says. Every rank calls. Raises UserError, which names the flag."""
    windows, _ = _open_windows((prefix,), flag_name, seq_length, allow_duplicates=True)
    return Samples(
        prefix,
        windows=windows,
        first=[0],
        sizes=[len(windows[0])],
        weights=None,
        seed=0,
        masking=Masking(eod, data.eod_mask_loss, data.reset_position_ids, data.reset_attention_mask),
        vocabulary_size=vocabulary_size,
        verify=data.verify_data,
    )


def _open_windows(
    data_path: Sequence[str], flag_name: str, seq_length: int, allow_duplicates: bool
) -> tuple[list[Windows], list[float] | None]:
    prefixes, weights = parse_data_path(data_path, flag_name)
    windows = [Windows(TokenFile.open(prefix, flag_name), seq_length) for prefix in prefixes]
    if not allow_duplicates:
        refuse_repeated_datasets(flag_name, prefixes)
    return windows, weights
