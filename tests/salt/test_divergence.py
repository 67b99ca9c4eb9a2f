"""The divergence of two passes equals that of full float64 logits, for any sharding, mask and distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.salt.fp8_check import divergence
from tests.model.test_loss import Alone, Storages
from tests.support.ranks import run_ranks

SEQUENCE, BATCH, HIDDEN, ROWS = 12, 3, 16, 64
TOKENS = SEQUENCE * BATCH


@dataclass(frozen=True)
class Case:
    tp: int = 1
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    chunk: int = 7
    vocabulary_size: int = 50
    temperature: float = 1.0
    noise: float = 0.1
    """Of the other pass, beside hidden states of size 1."""


class Inputs(NamedTuple):
    reference: Tensor  # [s, b, h]
    other: Tensor  # [s, b, h]
    weight: Tensor  # [ROWS, h], rows from vocabulary_size on hold arbitrary values
    mask: Tensor  # [s*b]


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    reference = draw(SEQUENCE, BATCH, HIDDEN)
    other, weight = reference + case.noise * draw(SEQUENCE, BATCH, HIDDEN), draw(ROWS, HIDDEN)
    weight[case.vocabulary_size :] = float("nan")
    mask = (torch.rand(TOKENS, generator=generator) > 0.3).float()
    reference.flatten(0, 1)[mask == 0] = float("nan")  # masked tokens may hold anything
    return Inputs(reference.to(case.dtype), other.to(case.dtype), weight.to(case.dtype), mask)


def oracle(inputs: Inputs, case: Case) -> tuple[float, float]:
    """(sum of KL, number of tokens with the same most likely id)."""
    valid = inputs.mask > 0
    weight = inputs.weight[: case.vocabulary_size].double()
    p, q = (hidden.flatten(0, 1)[valid].double() @ weight.t() / case.temperature for hidden in (inputs.reference, inputs.other))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum()), float((p.argmax(-1) == q.argmax(-1)).sum())


def on_a_rank(case: Case) -> tuple[float, float]:
    inputs, group = make_inputs(case), dist.group.WORLD
    assert group is not None
    shard = VocabularyShard(group, ROWS // case.tp, case.vocabulary_size, case.sequence_parallel)
    own = inputs.weight[shard.first : shard.first + shard.rows]
    hidden = [
        whole.chunk(case.tp)[group.rank()] if case.sequence_parallel else whole for whole in (inputs.reference, inputs.other)
    ]
    kl, agreement = divergence(*hidden, own, inputs.mask, shard, case.chunk, case.temperature)
    assert kl.dtype == agreement.dtype == torch.float64 and not kl.requires_grad
    return float(kl), float(agreement)


@pytest.mark.parametrize("case", [
    pytest.param(Case(), id="tp1"),
    pytest.param(Case(noise=1e-3), id="near"),
    pytest.param(Case(noise=3.0), id="far"),
    pytest.param(Case(chunk=1000, dtype=torch.bfloat16), id="bf16, one chunk"),
    pytest.param(Case(tp=2, sequence_parallel=True, vocabulary_size=57), id="tp2 slices"),
    pytest.param(Case(tp=2, dtype=torch.bfloat16, chunk=1), id="tp2 bf16"),
    pytest.param(Case(tp=2, sequence_parallel=True, temperature=0.25), id="tp2 slices, sharper"),
    pytest.param(Case(tp=4, sequence_parallel=True, vocabulary_size=33), id="tp4 slices, ranks of padding alone"),
])  # fmt: skip
def test_it_equals_full_logits_in_float64(case: Case) -> None:
    """Within 1e-6 nats a token, also when the passes nearly agree; the same on every rank."""
    kl, agreement = oracle(make_inputs(case), case)
    told = run_ranks(case.tp, on_a_rank, case)
    assert len(set(told)) == 1
    assert told[0][0] == pytest.approx(kl, rel=1e-6, abs=1e-6 * TOKENS) and told[0][1] == agreement


def here(reference: Tensor, other: Tensor, weight: Tensor, mask: Tensor) -> tuple[float, float]:
    shard = VocabularyShard(Alone(), weight.size(0), weight.size(0), False)
    kl, agreement = divergence(reference, other, weight, mask, shard, 5)
    return float(kl), float(agreement)


def test_of_a_pass_and_itself_it_is_0() -> None:
    inputs = make_inputs(Case())
    kl, agreement = here(inputs.reference, inputs.reference, inputs.weight[:50], inputs.mask)
    assert abs(kl) < 1e-6 and agreement == inputs.mask.sum()


def test_it_is_not_symmetric_and_the_reference_has_the_expectation() -> None:
    """The reference is nearly sure, the other is not: KL is log 4 nats. Exchanged, it is not."""
    sure, unsure = torch.tensor([[[30.0, 0.0]]]), torch.zeros(1, 1, 2)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert here(sure, unsure, weight, torch.ones(1))[0] == pytest.approx(1.386294, abs=1e-5)
    assert here(unsure, sure, weight, torch.ones(1))[0] == pytest.approx(22.5 - 1.386294, abs=1e-4)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_gives_nan_and_not_a_small_divergence(which: int) -> None:
    inputs = [tensor.nan_to_num() for tensor in make_inputs(Case())[:3]]
    inputs[which].flatten(0, -2)[4, 0] = float("nan")
    assert here(*inputs, torch.ones(TOKENS))[0] != here(*inputs, torch.ones(TOKENS))[0]


def test_the_largest_tensor_is_a_chunk_of_logits_however_many_tokens() -> None:
    vocabulary_size, chunk = 512, 32
    for num_tokens in (64, 1024):
        reference, other, weight = torch.randn(num_tokens, 1, 4), torch.randn(num_tokens, 1, 4), torch.randn(vocabulary_size, 4)
        mask = torch.ones(num_tokens)
        with Storages((reference, other, weight, mask)) as new:
            divergence(reference, other, weight, mask, VocabularyShard(Alone(), vocabulary_size, vocabulary_size, False), chunk)
        assert max(new.sizes) == vocabulary_size * chunk * 4
