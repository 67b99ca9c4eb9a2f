"""The teacher's output weight is cut to the ids that both models have, and what it loses by that is measured as in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.salt.output_weight import cut_rows, dropped_mass
from tests.support.ranks import run_ranks

SEQUENCE, BATCH, HIDDEN = 8, 2, 6


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Cut:
    tp: int
    whole_rows: int
    """Rows of a rank before."""
    rows: int
    """Rows of a rank after."""
    shared_ids: int


def cut(case: Cut) -> Tensor:
    whole = VocabularyShard(dist.group.WORLD, case.whole_rows, case.tp * case.whole_rows, True)
    shard = VocabularyShard(dist.group.WORLD, case.rows, case.tp * case.rows, True)
    weight = drawn(case.tp * case.whole_rows, HIDDEN).chunk(case.tp)[dist.get_rank()].clone()
    return cut_rows(weight, whole, shard, case.shared_ids)


@pytest.mark.parametrize(
    "case",
    [Cut(1, 10, 8, 7), Cut(1, 10, 16, 10), Cut(2, 10, 8, 13), Cut(2, 10, 16, 20), Cut(4, 5, 8, 17), Cut(4, 9, 4, 6)],
)
def test_every_rank_has_the_shared_rows_that_are_its_own(case: Cut) -> None:
    """Ranks with more rows after than before, with fewer, and with none that are shared."""
    expected = torch.zeros(case.tp * case.rows, HIDDEN)
    count = min(case.shared_ids, len(expected))
    expected[:count] = drawn(case.tp * case.whole_rows, HIDDEN)[:count]
    assert torch.equal(torch.cat(run_ranks(case.tp, cut, case)), expected)


@dataclass(frozen=True)
class Mass:
    tp: int
    ids: int
    shared_ids: int
    temperature: float
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        return -(-self.ids // self.tp)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [s, b, h], weight [rows, h] with NaN in padding, mask [s*b]"""
        weight = drawn(self.tp * self.rows, HIDDEN, seed=1)
        weight[self.ids :] = float("nan")
        hidden, mask = drawn(SEQUENCE, BATCH, HIDDEN, seed=2), (drawn(SEQUENCE * BATCH) > -0.5).float()
        hidden.flatten(0, 1)[mask == 0] = float("nan")
        return hidden.to(self.dtype), weight.to(self.dtype), mask


def mass(case: Mass) -> float:
    hidden, weight, mask = case.inputs()
    rank = dist.get_rank()
    shard = VocabularyShard(dist.group.WORLD, case.rows, case.ids, True)
    shares = hidden.chunk(case.tp)[rank], weight.chunk(case.tp)[rank]
    return float(dropped_mass(*shares, mask, shard, case.shared_ids, 5, case.temperature))


@pytest.mark.parametrize(
    "case",
    [
        Mass(1, 40, 33, 1.0), Mass(2, 40, 33, 0.25), Mass(2, 40, 11, 1.0), Mass(4, 39, 20, 0.25), Mass(4, 5, 5, 1.0),
        Mass(2, 40, 33, 0.25, torch.bfloat16),
    ],
)  # fmt: skip
def test_the_dropped_probability_is_that_of_full_logits(case: Mass) -> None:
    """Masked tokens may hold anything. A rank may have no id at all."""
    hidden, weight, mask = case.inputs()
    p = (hidden.double() @ weight[: case.ids].double().t() / case.temperature).flatten(0, 1).softmax(-1)
    expected = p[mask > 0][:, case.shared_ids :].sum().item()
    told = run_ranks(case.tp, mass, case)
    assert told == [pytest.approx(expected, rel=1e-5)] * case.tp
