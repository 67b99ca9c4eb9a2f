"""The batch whose loss identifies a teacher is a pure function; a shorter batch is the beginning of a longer one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_salt.data.reference_batch import fixed_batch, fixed_tokens, prefix_lengths


@pytest.mark.parametrize(
    "seq_length, lengths", [(1, [1]), (16, [16]), (17, [16, 17]), (64, [16, 64]), (1280, [16, 64, 256, 1024, 1280])]
)
def test_lengths_grow_fourfold_and_end_with_the_whole_context(seq_length: int, lengths: list[int]) -> None:
    assert prefix_lengths(seq_length) == lengths


def test_the_tokens_are_these_for_ever() -> None:
    """Recorded losses belong to these ids: a change here would make every earlier checkpoint unrecognisable."""
    assert fixed_tokens(257, 0, 6).tolist() == [137, 9, 89, 9, 80, 239]
    assert fixed_tokens(256_000, 3, 6).tolist() == [134786, 129945, 101294, 240785, 40132, 179245]


@pytest.mark.parametrize("vocabulary_size", [1, 2, 257, 256_000])
def test_tokens_are_in_the_vocabulary_and_those_of_a_shorter_context_come_first(vocabulary_size: int) -> None:
    tokens = fixed_tokens(vocabulary_size, 2, 4096)
    assert tokens.dtype == np.int64 and tokens.min() >= 0 and tokens.max() < vocabulary_size
    assert np.array_equal(fixed_tokens(vocabulary_size, 2, 100), tokens[:100])
    assert len(np.unique(tokens)) > 0.9 * min(vocabulary_size, 4096)


def test_microbatches_differ_and_count_their_first_positions_alone() -> None:
    batch = fixed_batch(257, 100, prefix_lengths(100))
    assert [int(one.loss_mask.sum()) for one in batch] == [16, 64, 100]
    for one, length in zip(batch, (16, 64, 100), strict=True):
        assert one.loss_mask[0, :length].all() and one.tokens.shape == one.labels.shape == (1, 100)
        assert torch.equal(one.tokens[:, 1:], one.labels[:, :-1]) and one.documents is None
    assert not torch.equal(batch[0].tokens, batch[1].tokens)


def test_a_shorter_context_takes_the_beginnings_of_the_same_microbatches() -> None:
    longer = fixed_batch(257, 100, [16, 64, 100])
    for one, other in zip(fixed_batch(257, 70, [16, 64]), longer, strict=False):
        assert torch.equal(one.tokens, other.tokens[:, :70]) and torch.equal(one.loss_mask, other.loss_mask[:, :70])


@pytest.mark.parametrize("multiple, count", [(1, 3), (2, 4), (4, 4)])
def test_the_last_microbatch_fills_up(multiple: int, count: int) -> None:
    batch = fixed_batch(257, 100, [16, 64, 100], multiple)
    assert len(batch) == count
    assert all(torch.equal(one.tokens, batch[2].tokens) for one in batch[2:])
