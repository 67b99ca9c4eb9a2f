"""Scores of tokens and windows against full logits in float64, one token and one window at a time, with numpy's medians."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.model.token_scores import TokenScorer, TokenScores, window_scores
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.selection.score_format import columns
from tests.model.test_loss import Alone
from tests.support.ranks import run_ranks

LENGTH, BATCH, HIDDEN, ROWS = 13, 4, 16, 64
TOP_K = (1, 3, 10, 50)


@dataclass(frozen=True)
class Case:
    tp: int = 1
    dtype: torch.dtype = torch.float32
    chunk: int = 7
    vocabulary_size: int = 50
    ties: bool = False


class Inputs(NamedTuple):
    hidden: Tensor  # [s, b, h]
    weight: Tensor  # [ROWS, h], rows from vocabulary_size on hold arbitrary values
    labels: Tensor  # [s*b]
    mask: Tensor  # [s*b]


def make_inputs(case: Case) -> Inputs:
    """With ties: small whole numbers, whose products are exact in float32, so that many logits are equal."""
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN, generator=generator)
    weight = torch.randn(ROWS, HIDDEN, generator=generator)
    if case.ties:
        hidden, weight = hidden.round(), weight.round().clamp(-1, 1)
    weight[case.vocabulary_size :] = float("nan")
    labels = torch.randint(0, case.vocabulary_size, (LENGTH * BATCH,), generator=generator)
    mask = (torch.rand(LENGTH * BATCH, generator=generator) > 0.2).float()
    labels[mask == 0] = -1  # a label of a masked token may be outside the vocabulary
    return Inputs(hidden.to(case.dtype), weight.to(case.dtype), labels, mask)


def oracle(inputs: Inputs, case: Case) -> list[tuple[float, float, float]]:
    """Oracle: (loss, rank, entropy) of each token that counts."""
    logits = inputs.hidden.double().flatten(0, 1) @ inputs.weight[: case.vocabulary_size].double().t()
    told = []
    for row, label, mask in zip(logits, inputs.labels.tolist(), inputs.mask.tolist(), strict=True):
        if mask:
            log_p = row.log_softmax(-1)
            told.append((-log_p[label].item(), float((row > row[label]).sum()), -(log_p.exp() * log_p).sum().item()))
    return told


def scores_here(case: Case) -> TokenScores:
    """The scores on one rank of a tensor-parallel group."""
    inputs, group = make_inputs(case), dist.group.WORLD
    assert group is not None
    shard = VocabularyShard(group, ROWS // case.tp, case.vocabulary_size, sequence_parallel=False)
    own = inputs.weight[shard.first : shard.first + shard.rows]
    return TokenScorer(own, shard, case.chunk).score(inputs.hidden, inputs.labels, inputs.mask)


CASES = [
    pytest.param(Case(), id="tp1"),
    pytest.param(Case(ties=True), id="ties"),
    pytest.param(Case(dtype=torch.bfloat16, chunk=1), id="bf16"),
    pytest.param(Case(tp=2, vocabulary_size=57, chunk=100), id="tp2"),
    pytest.param(Case(tp=4, dtype=torch.bfloat16), id="tp4 bf16"),
    pytest.param(Case(tp=4, vocabulary_size=33, ties=True), id="tp4, ranks of padding alone, ties"),
]


@pytest.mark.parametrize("case", CASES)
def test_loss_rank_and_entropy_of_each_token_equal_full_logits(case: Case) -> None:
    """bfloat16 inputs are exact and products are summed in float32. So both dtypes have the tolerance of float32."""
    expected = oracle(make_inputs(case), case)
    counts = make_inputs(case).mask > 0
    everyone = run_ranks(case.tp, scores_here, case)
    for scores in everyone:
        found = torch.stack([scores.loss, scores.rank, scores.entropy], 1)[counts].double()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=2e-6)
        assert torch.equal(found[:, 1], torch.tensor(expected, dtype=torch.float64)[:, 1])
        assert all(
            torch.equal(one, other) for one, other in zip(vars(scores).values(), vars(everyone[0]).values(), strict=True)
        )
    assert len({rank for _, rank, _ in expected}) > 15


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_device_equals_full_logits(dtype: torch.dtype, device: str) -> None:
    case = Case(dtype=dtype)
    inputs = make_inputs(case)
    hidden, weight, labels, mask = (tensor.to(device) for tensor in inputs)
    scores = TokenScorer(weight, VocabularyShard(Alone(), ROWS, case.vocabulary_size, False), case.chunk).score(
        hidden, labels, mask
    )
    found = torch.stack([scores.loss, scores.rank, scores.entropy], 1)[mask > 0].cpu().double()
    torch.testing.assert_close(found, torch.tensor(oracle(inputs, case), dtype=torch.float64), rtol=2e-6, atol=2e-6)


def window_oracle(loss: np.ndarray, rank: np.ndarray, entropy: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Oracle: one window, with numpy's median and mean, from the definitions."""
    told = {}
    loss, rank, entropy = loss[valid], rank[valid], entropy[valid]
    for k in TOP_K:
        zeroed, dropped = np.where(rank < k, loss, 0), loss[rank < k]
        told[f"median_zeroed_{k}"] = np.median(zeroed) if zeroed.size else 0
        told[f"mean_zeroed_{k}"] = zeroed.mean() if zeroed.size else 0
        told[f"median_dropped_{k}"] = np.median(dropped) if dropped.size else 0
        told[f"mean_dropped_{k}"] = dropped.mean() if dropped.size else 0
        told[f"share_{k}"] = len(dropped) / len(loss) if loss.size else 0
    told |= {
        name: of(values) if values.size else 0
        for name, of, values in (("median", np.median, loss), ("mean", np.mean, loss), ("entropy", np.mean, entropy))
    }
    return told | {"tokens": len(loss)}


@pytest.mark.parametrize("length", [1, 2, 7, 8, 33])
def test_columns_of_windows_equal_numpys_medians_and_means(length: int) -> None:
    """Odd and even lengths; windows without a token that counts, without one inside the top k, or with equal losses."""
    random = np.random.default_rng(length)
    loss = random.integers(0, 12, (40, length)).astype(np.float32) / 4
    rank, entropy = random.integers(0, 70, (40, length)).astype(np.float32), random.random((40, length), np.float32)
    valid = random.random((40, length)) < random.random((40, 1))
    valid[0], valid[1], rank[2], rank[3] = False, True, 99, 0
    loss[~valid] = 1e9  # must not matter
    scores = TokenScores(torch.from_numpy(loss), torch.from_numpy(rank), torch.from_numpy(entropy))
    found = window_scores(scores, torch.from_numpy(valid).float(), TOP_K)
    expected = [window_oracle(*rows) for rows in zip(loss.astype(float), rank, entropy.astype(float), valid, strict=True)]
    names = [name for name in columns(TOP_K, length) if name != "content"]
    assert list(expected[0]) == names and found.shape == (len(names), 40)
    for name, values in zip(names, found.tolist(), strict=True):
        assert values == pytest.approx([row[name] for row in expected], rel=1e-12, abs=1e-12), name


def test_a_window_with_no_token_inside_the_top_k_scores_0_and_is_not_nan() -> None:
    scores = TokenScores(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[50.0, 60.0, 70.0]]), torch.ones(1, 3))
    found = dict(zip(columns((10,), 3), window_scores(scores, torch.ones(1, 3), (10,))[:, 0].tolist(), strict=False))
    assert found == {
        "median_zeroed_10": 0,
        "mean_zeroed_10": 0,
        "median_dropped_10": 0,
        "mean_dropped_10": 0,
        "share_10": 0,
        "median": 2,
        "mean": 2,
        "entropy": 1,
        "tokens": 3,
    }
