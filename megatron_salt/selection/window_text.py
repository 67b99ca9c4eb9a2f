"""The text of windows, for the examples in a selection's report and for exported documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.manifest import fingerprint, read_manifest
from megatron_salt.data.windows import Windows, first_ids, locate
from megatron_salt.errors import UserError
from megatron_salt.selection.score_format import IndexManifest
from megatron_salt.tokenizer.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class WindowText:
    """The datasets of an index, and the tokenizer that made them."""

    windows: tuple[Windows, ...]
    """One for each dataset of the index, in its order."""
    tokenizer: Tokenizer

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, window in it) of samples: int64 [n] -> int64 [n], int64 [n]."""
        return locate(first_ids(len(windows) for windows in self.windows), ids)

    def of(self, ids: np.ndarray) -> list[str]:
        """The text of the L input tokens of each sample, int64 [n]. An empty line stands where a document ends inside the sample."""
        texts = []
        for dataset, window in zip(*(numbers.tolist() for numbers in self.locate(ids)), strict=True):
            tokens = self.windows[dataset].read(window)[:-1]
            ends = [] if self.tokenizer.eod is None else (np.flatnonzero(tokens == self.tokenizer.eod) + 1).tolist()
            parts = [tokens[start:end].tolist() for start, end in itertools.pairwise([0, *ends, len(tokens)]) if start < end]
            texts.append("\n\n".join(self.tokenizer.decode(part) for part in parts))
        return texts


def open_windows(manifest: IndexManifest, prefixes: Sequence[str]) -> tuple[Windows, ...]:
    """Open the datasets of an index at `prefixes`. UserError where they are not the data that was scored."""
    if len(prefixes) != len(manifest.datasets):
        raise UserError(
            f"--data-path names {len(prefixes)} datasets, the index has scores of {len(manifest.datasets)}: "
            f"{' '.join(dataset.prefix for dataset in manifest.datasets)}"
        )
    opened = []
    for prefix, scored in zip(prefixes, manifest.datasets, strict=True):
        windows = Windows(TokenFile.open(prefix), manifest.seq_length)
        hashed = scored.fingerprint.startswith("content:") and read_manifest(prefix) is None  # scored with --verify-data
        actual = fingerprint(prefix, verify=hashed)
        if actual != scored.fingerprint or len(windows) != scored.samples:
            raise UserError(
                f"--data-path {prefix} is not the data that was scored: it has {len(windows)} samples and the fingerprint "
                f"{actual}, the index says {scored.samples} and {scored.fingerprint}"
            )
        opened.append(windows)
    return tuple(opened)


def find_tokenizer(fingerprint: str, directories: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer with this fingerprint, from the first directory that has it. UserError where a tokenizer is damaged."""
    for directory in directories:
        if directory.is_dir():
            tokenizer = load_tokenizer(directory)
            if tokenizer.fingerprint == fingerprint:
                return tokenizer
    return None
