"""Masks of documents are Megatron's, and each sample has its own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_salt.config import DataConfig
from megatron_salt.data.batch import Batches
from megatron_salt.data.masking import Masking
from megatron_salt.data.samples import open_training_data
from megatron_salt.errors import UserError
from tests.data.batch.conftest import EOD, LENGTH, open_train


def slow_masks(tokens: list[int], masking: Masking) -> tuple[list[float], list[int], list[int]]:
    """Slow twin of Masking.of: one token at a time."""
    loss_mask, position_ids, document_of = [], [], []
    position = document = 0
    for index, token in enumerate(tokens):
        loss_mask.append(0.0 if masking.eod_mask_loss and token == EOD else 1.0)
        position_ids.append(position if masking.reset_position_ids else index)
        document_of.append(document)
        position += 1
        if token == EOD:
            position = 0
            document += 1
    return loss_mask, position_ids, document_of


FLAGS = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]


@pytest.mark.parametrize("flags", FLAGS)
def test_masks_equal_the_slow_twin(flags: tuple[bool, bool, bool]) -> None:
    masking = Masking(EOD, *flags)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (50, 13))
    tokens[0], tokens[1], tokens[2, 0], tokens[3, -1] = EOD, 1, EOD, EOD
    loss_mask, position_ids, document_of = masking.of(tokens)
    expected = [slow_masks(row.tolist(), masking) for row in tokens]
    assert loss_mask.dtype == np.float32 and position_ids.dtype == np.int64
    assert loss_mask.tolist() == [e[0] for e in expected]
    assert position_ids.tolist() == [e[1] for e in expected]
    if masking.reset_attention_mask:
        assert document_of is not None and document_of.dtype == np.int64
        assert document_of.tolist() == [e[2] for e in expected]
    else:
        assert document_of is None


@pytest.mark.parametrize("flags", FLAGS)
def test_masks_equal_megatron_cores(flags: tuple[bool, bool, bool]) -> None:
    import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    eod_mask_loss, reset_position_ids, reset_attention_mask = flags
    tokens = np.random.default_rng(1).integers(0, 4, (20, 13))
    loss_mask, position_ids, document_of = Masking(EOD, *flags).of(tokens)
    for row in range(20):
        hidden, their_loss_mask, their_position_ids = _get_ltor_masks_and_position_ids(
            torch.from_numpy(tokens[row]), EOD, reset_position_ids, reset_attention_mask, eod_mask_loss, True
        )
        assert loss_mask[row].tolist() == their_loss_mask.tolist()
        assert position_ids[row].tolist() == their_position_ids.tolist()
        visible = np.tril(np.ones((13, 13), bool))
        if document_of is not None:
            visible &= document_of[row][:, None] == document_of[row][None, :]
        assert np.array_equal(~visible, hidden[0].numpy())


def test_batches_carry_the_masks_of_their_own_samples(data: DataConfig) -> None:
    train = open_train(dataclasses.replace(data, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True))
    for m in Batches(train, global_batch_size=12, micro_batch_size=3, replica=0, num_replicas=1).fetch(24):
        loss_mask, position_ids, document_of = train.masking.of(m.tokens.numpy())
        assert m.documents is not None
        assert m.loss_mask.numpy().tolist() == loss_mask.tolist() and 0.0 in loss_mask
        assert m.position_ids.numpy().tolist() == position_ids.tolist()
        assert m.documents.numpy().tolist() == (document_of.tolist() if document_of is not None else None)
        assert all(tensor.is_contiguous() for tensor in (m.tokens, m.labels, m.loss_mask, m.position_ids, m.documents))


@pytest.mark.parametrize("flag, options", [
    ("--eod-mask-loss", DataConfig(eod_mask_loss=True)),
    ("--reset-position-ids", DataConfig(reset_position_ids=True)),
    ("--reset-attention-mask", DataConfig(reset_attention_mask=True)),
])  # fmt: skip
def test_masks_need_an_end_of_document_token(data: DataConfig, flag: str, options: DataConfig) -> None:
    options = dataclasses.replace(options, data_path=data.data_path)
    open_training_data(options, LENGTH, 1, 100, EOD)
    with pytest.raises(UserError, match=f"^{flag} needs an end-of-document token"):
        open_training_data(options, LENGTH, 1, 100, None)
