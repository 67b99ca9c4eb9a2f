"""A microbatch on its way to the device: cut for context parallelism, and merged with others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_salt.data.batch import Microbatch, make_microbatch, merge_microbatches
from megatron_salt.data.masking import Masking
from megatron_salt.parallel.layout import context_slice

LENGTH, TENSORS = 16, ("tokens", "labels", "loss_mask", "position_ids")


def samples(first: int, count: int, documents: bool = True) -> Microbatch:
    tokens = np.random.default_rng(first).integers(0, 5, (count, LENGTH + 1))
    return make_microbatch(np.arange(first, first + count), tokens, Masking(0, True, True, documents))


@pytest.mark.parametrize("context", [1, 2, 4])
def test_the_shares_of_all_context_parallel_ranks_are_the_whole_sequence_once(context: int) -> None:
    whole = samples(0, 3)
    shares = [whole.to_device(context, rank) for rank in range(context)]
    for name in TENSORS:
        again = torch.full_like(getattr(whole, name), -1)
        for rank, share in enumerate(shares):
            parts = getattr(share, name).split(LENGTH // context // (1 if context == 1 else 2), dim=1)
            for positions, part in zip(context_slice(LENGTH, context, rank), parts, strict=True):
                again[:, positions] = part
        assert torch.equal(again, getattr(whole, name)), name


def test_documents_stay_whole_for_attention() -> None:
    whole = samples(0, 3)
    share = whole.to_device(2, 1)
    assert whole.documents is not None and share.documents is not None
    assert torch.equal(share.documents, whole.documents) and share.tokens.size(1) == LENGTH // 2


@pytest.mark.parametrize("documents", [True, False])
def test_merged_microbatches_are_their_samples_in_order(documents: bool) -> None:
    parts = [samples(0, 2, documents), samples(2, 2, documents), samples(4, 1, documents)]
    merged = merge_microbatches(parts)
    assert merged.sample_ids.tolist() == [0, 1, 2, 3, 4] and (merged.documents is not None) == documents
    for name in (*TENSORS, "documents") if documents else TENSORS:
        assert torch.equal(getattr(merged, name), torch.cat([getattr(part, name) for part in parts])), name
