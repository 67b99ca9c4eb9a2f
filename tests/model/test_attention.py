"""Attention is causal, stays inside documents, and works with context parallelism; dropout differs between ranks with different heads."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import get_model_config

from megatron_salt.config import ParallelConfig
from megatron_salt.model.attention import attention_mask, positions_of
from megatron_salt.train.step import unwrap
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, SEQ_LENGTH, VOCABULARY, Case, build_student

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Group:
    """The part of a process group that a mask needs."""

    ranks: int
    own: int = 0

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("with_documents", [False, True])
def test_a_token_sees_itself_and_earlier_tokens_of_its_document(context, with_documents):
    """Oracle: the definition, for each pair of positions, with queries and keys in zigzag order."""
    length = 16
    documents = torch.tensor([[0] * 5 + [1] * 1 + [2] * 10, [0] * 16]) if with_documents else None
    for rank in range(context):
        mask = attention_mask(documents, length, Group(context, rank), CPU)
        queries = positions_of(length, context, rank, CPU).tolist()
        keys = [position for other in range(context) for position in positions_of(length, context, other, CPU).tolist()]
        if context == 1 and not with_documents:
            assert mask is None  # causal, without a mask in memory
            continue
        for sample in range(mask.size(0)):
            expected = [[key <= query and (documents is None or documents[sample, key] == documents[sample, query]) for key in keys]
                        for query in queries]  # fmt: skip
            assert mask[sample, 0].tolist() == expected
        assert sorted(keys) == list(range(length)) and mask.shape == (2 if with_documents else 1, 1, length // context, length)


def hidden_states(case: Case, tokens: Tensor, positions: Tensor, documents: Tensor | None) -> Tensor:
    model = unwrap(build_student(case, 1).chunks[0]).eval()
    with torch.no_grad():
        return model(tokens, positions, attention_mask(documents, tokens.size(1), model.cp_group, CPU))


@pytest.mark.parametrize("model", ["tied", "gpt2"])
def test_a_document_is_what_it_would_be_alone(model):
    """Oracle: the document alone. Packed with others into one sample its positions restart: learned ones need that, rotary ones do not."""
    lengths = [9, 1, SEQ_LENGTH - 10]
    tokens = torch.randint(0, VOCABULARY, (1, SEQ_LENGTH), generator=torch.Generator().manual_seed(3))
    documents = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    case = Case(model=MODELS[model])
    packed = run_ranks(1, hidden_states, case, tokens, positions, documents)[0]
    if model == "tied":
        running = run_ranks(1, hidden_states, case, tokens, torch.arange(SEQ_LENGTH)[None], documents)[0]
        torch.testing.assert_close(running, packed)
    for number in range(len(lengths)):
        own = documents[0] == number
        alone = run_ranks(1, hidden_states, case, tokens[:, own], positions[:, own], None)[0]
        torch.testing.assert_close(packed[own], alone, rtol=1e-5, atol=1e-5)
    mixed = run_ranks(1, hidden_states, case, tokens, positions, None)[0]
    torch.testing.assert_close(packed[: lengths[0]], mixed[: lengths[0]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed[lengths[0] :], mixed[lengths[0] :], atol=1e-3)


def test_later_tokens_do_not_matter():
    tokens = torch.randint(0, VOCABULARY, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCABULARY
    positions = torch.arange(SEQ_LENGTH).expand(2, -1)
    before, after = (run_ranks(1, hidden_states, Case(), some, positions, None)[0] for some in (tokens, changed))
    torch.testing.assert_close(before[:20], after[:20], rtol=0, atol=0)
    assert not torch.allclose(before[20:], after[20:], atol=1e-3)


def dropped(case: Case, world_size: int, train: bool) -> tuple[Tensor, Tensor]:
    """Outputs of core attention for the same heads on every rank, and the hidden states of the whole model."""
    student = build_student(case, world_size)
    model = unwrap(student.chunks[0]).train(train)
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(8, 2, heads, 16, generator=generator) for heads in (4, 2, 2))
    with get_cuda_rng_tracker().fork() if case.parallel.sequence_parallel else nullcontext():  # as TransformerBlock does
        core = model.decoder.layers[0].self_attention.core_attention(query, key, value, None)
    tokens = torch.arange(2 * SEQ_LENGTH).view(2, SEQ_LENGTH)
    assert get_model_config(model).attention_dropout == case.model.attention_dropout
    return core.detach(), model(tokens, torch.arange(SEQ_LENGTH).expand(2, -1), None).detach()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_differs_where_activations_are_split_and_agrees_where_they_are_copies(sequence_parallel):
    """Ranks hold different heads, so their attention dropout differs. Without sequence parallelism they hold equal hidden states."""
    sizes = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    case = Case(sizes, replace(MODELS["tied"], attention_dropout=0.3, hidden_dropout=0.3))
    (core_0, hidden_0), (core_1, hidden_1) = run_ranks(2, dropped, case, 2, True)
    assert not torch.equal(core_0, core_1)
    assert hidden_0.size(0) == (SEQ_LENGTH // 2 if sequence_parallel else SEQ_LENGTH)
    if not sequence_parallel:
        torch.testing.assert_close(hidden_0, hidden_1, rtol=1e-5, atol=1e-5)


def dropped_embedding(case: Case) -> Tensor:
    """The channels of the embedding that dropout removes on this rank's half of the sequence."""
    model = unwrap(build_student(case, 2).chunks[0])
    tokens = torch.zeros(2, SEQ_LENGTH, dtype=torch.int64)
    return model.embedding(tokens, torch.arange(SEQ_LENGTH).expand(2, -1)).detach() == 0


def test_halves_of_a_sequence_drop_differently_under_sequence_parallelism():
    """The sequence repeats one token: without dropout, or with equal masks, both halves would be equal."""
    sizes = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    first, second = run_ranks(2, dropped_embedding, Case(sizes, replace(MODELS["tied"], hidden_dropout=0.5)))
    assert first.shape == second.shape and not torch.equal(first, second)
    assert first.float().mean() == pytest.approx(0.5, abs=0.05) and second.float().mean() == pytest.approx(0.5, abs=0.05)
    first, second = run_ranks(2, dropped_embedding, Case(sizes))
    assert not first.any() and not second.any()


def test_evaluation_drops_nothing():
    dropout = Case(model=replace(MODELS["tied"], attention_dropout=0.3, hidden_dropout=0.3))
    for with_dropout, without in zip(
        run_ranks(1, dropped, dropout, 1, False)[0], run_ranks(1, dropped, Case(), 1, True)[0], strict=True
    ):
        assert torch.equal(with_dropout, without)


def grouped(dtype: torch.dtype, with_mask: bool) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
    """Core attention of 4 heads over 2 groups: its output and gradients, its inputs, and the (query, key) heads that torch saw."""
    core = unwrap(build_student(Case(dtype=dtype), 1).chunks[0]).decoder.layers[0].self_attention.core_attention
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(8, 3, heads, 16, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((query.size(1), key.size(1)))
        return attend(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        out = core(*inputs, attention_mask(DOCUMENTS, 8, Group(1), CPU) if with_mask else None)
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    return [out.detach(), *(tensor.grad for tensor in inputs)], [tensor.detach() for tensor in inputs], seen


DOCUMENTS = torch.tensor([[0] * 8, [0] * 3 + [1] * 5, [0, 1, 2, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("with_mask", [True, False])
def test_grouped_queries_with_a_mask(dtype, tolerance, with_mask):
    """Oracle: softmax over visible keys in float64, keys and values repeated for the heads of a group."""
    [(ours, inputs, seen)] = run_ranks(1, grouped, dtype, with_mask)
    assert seen == [(4, 4 if with_mask else 2)]  # with a mask, memory-efficient attention takes no groups
    query, key, value = (tensor.double().requires_grad_() for tensor in inputs)
    heads_key, heads_value = (tensor.repeat_interleave(2, dim=2) for tensor in (key, value))
    documents = DOCUMENTS if with_mask else torch.zeros_like(DOCUMENTS)
    visible = (documents[:, :, None] == documents[:, None, :]) & torch.ones(8, 8).tril().bool()
    scores = torch.einsum("sbhd,tbhd->bhst", query, heads_key) / 4
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhst,tbhd->sbhd", weights, heads_value).flatten(2)
    out.backward(torch.randn(out.shape, generator=after_inputs()).to(dtype).double())
    for mine, exact in zip(ours, (out.detach(), query.grad, key.grad, value.grad), strict=True):
        assert (mine.double() - exact).norm() < tolerance * exact.norm()


def after_inputs() -> torch.Generator:
    """The generator of `grouped`, after it has drawn the inputs."""
    generator = torch.Generator().manual_seed(7)
    for heads in (4, 2, 2):
        torch.randn(8, 3, heads, 16, generator=generator)
    return generator
