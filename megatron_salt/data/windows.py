"""A dataset cut into windows of fixed length: the samples of training.

Window i of a dataset of N tokens is tokens [i*L, i*L + L]: L inputs and, one further, L labels. Its last token is the first
of window i+1. So there are (N-1)//L windows, whatever the seed, batch size or number of epochs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.errors import UserError


def first_ids(sizes: Iterable[int]) -> np.ndarray:
    """Global ids number the windows of all datasets, in their order. -> int64 [datasets + 1]: the id of each dataset's first window, and
    last the number of all windows. sizes: windows of each dataset."""
    return np.cumsum([0, *sizes], dtype=np.int64)


def locate(firsts: np.ndarray, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, window in it) of global ids: int64 [n] -> int64 [n], int64 [n]. firsts: `first_ids`."""
    dataset = np.searchsorted(firsts, sample_ids, side="right") - 1
    return dataset, sample_ids - firsts[dataset]


class Windows:
    """The windows of one dataset, each L + 1 tokens. UserError if the dataset is shorter than one window."""

    def __init__(self, file: TokenFile, seq_length: int) -> None:
        self.file = file
        self.seq_length = seq_length
        self._num_windows = (file.num_tokens - 1) // seq_length
        if self._num_windows == 0:
            raise UserError(
                f"{file.flag} {file.prefix}: {file.num_tokens} tokens are fewer than one sample of --seq-length {seq_length}, "
                f"which takes {seq_length + 1}; make the dataset of more text, or --seq-length shorter"
            )

    def __len__(self) -> int:
        return self._num_windows

    def read(self, window: int) -> np.ndarray:
        """Tokens of one window -> int64 [L + 1]."""
        return self.read_many(np.array([window]))[0]

    def read_many(self, windows: np.ndarray) -> np.ndarray:
        """Tokens of several windows, int [n], in the order given -> int64 [n, L + 1]."""
        assert windows.size == 0 or (windows.min() >= 0 and windows.max() < self._num_windows), (windows, self._num_windows)
        return self.file.read(windows.astype(np.int64) * self.seq_length, self.seq_length + 1)


def num_held_out(num_windows: int, valid_share: float, prefix: str, seq_length: int) -> int:
    """Number of windows at the end of a dataset that --valid-share holds out: at least one, unless the share is 0.

    UserError where no window would remain for training. prefix, seq_length: for the message.
    """
    if not valid_share:
        return 0
    if num_windows < 2:
        raise UserError(
            f"--valid-share {valid_share}: {prefix} has {num_windows} window of --seq-length {seq_length}; at least one must remain for "
            "training and one be held out"
        )
    return max(1, int(num_windows * valid_share))
