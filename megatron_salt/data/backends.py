"""What encodes: the tokenizer's own library, or gigatoken where it gives the same ids.

A backend other than the reference is used only after `first_difference` found none on a sample of the user's own text and on
texts that are known to be hard. Backends answer arrays: the ids of all texts end to end, and the texts' lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np

from megatron_salt.data.tokenizer import Tokenizer

Backend = Literal["reference", "gigatoken"]
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts -> (ids end to end, int64 lengths)."""


def encode_with(tokenizer: Tokenizer, backend: Backend) -> Encode:
    """How a backend encodes for a tokenizer."""
    return reference(tokenizer)


def reference(tokenizer: Tokenizer) -> Encode:
    """The tokenizer's own library."""
    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        documents = tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return np.fromiter(itertools.chain.from_iterable(documents), np.int32, int(lengths.sum())), lengths

    return encode
