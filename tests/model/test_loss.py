"""The fused loss equals full logits in float64: value and both gradients, for any sharding and chunk size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_salt.model.loss import fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard
from tests.support.ranks import run_ranks

SEQUENCE, BATCH, HIDDEN, ROWS = 12, 3, 16, 64

# Norm of the difference over norm of the oracle's gradient. float32: summation order. bfloat16 (2^-9 = 2e-3 a rounding):
# logits, their gradient, d(hidden) and, on a CPU, each chunk's product for the weight are rounded once each.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Case:
    tp: int = 1
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    chunk: int = 16
    vocabulary_size: int = ROWS
    mask: str = "some"
    scale: float = 1.0
    logit_std: float = 1.5

    @property
    def tolerance(self) -> float:
        # a rounded logit z moves its probability by the share z * 2^-24 (2^-9)
        return TOLERANCE[self.dtype] * max(1.0, self.logit_std / 5)


class Inputs(NamedTuple):
    hidden: Tensor  # [s, b, h]
    weight: Tensor  # [ROWS, h], rows from vocabulary_size on hold arbitrary values
    labels: Tensor  # [s*b]
    mask: Tensor  # [s*b]


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)
    weight = torch.randn(ROWS, HIDDEN, generator=generator) * case.logit_std / HIDDEN**0.5
    labels = torch.randint(0, case.vocabulary_size, (SEQUENCE * BATCH,), generator=generator)
    draw = torch.rand(SEQUENCE * BATCH, generator=generator)
    mask = {"all": (draw > -1), "some": (draw > 0.4), "none": (draw > 1), "weights": draw.round(decimals=1)}[case.mask].float()
    weight[case.vocabulary_size :] = float("nan")
    return Inputs(hidden.to(case.dtype), weight.to(case.dtype), labels, mask)


def oracle(inputs: Inputs, vocabulary_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle: loss, d(hidden), d(weight) from full logits in float64."""
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight[:vocabulary_size].double().requires_grad_()
    log_p = (hidden @ weight.t()).log_softmax(-1).flatten(0, 1)
    loss = -(log_p.gather(1, inputs.labels[:, None])[:, 0] * inputs.mask).sum()
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    d_weight = torch.zeros(inputs.weight.shape, dtype=torch.float64)
    d_weight[:vocabulary_size] = weight.grad
    return loss.detach(), hidden.grad, d_weight


def relative_error(ours: Tensor, exact: Tensor) -> float:
    assert ours.isfinite().all()
    return float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def on_a_rank(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics and this rank's gradients: d_hidden of its slice of the sequence, d_weight of its ids."""
    tp, rank = dist.get_world_size(), dist.get_rank()
    hidden = inputs.hidden.chunk(tp)[rank] if case.sequence_parallel else inputs.hidden
    hidden = hidden.clone().requires_grad_()
    weight = inputs.weight.chunk(tp)[rank].clone().requires_grad_()
    before = [tensor.detach().clone() for tensor in (hidden, weight, inputs.labels, inputs.mask)]
    shard = VocabularyShard(dist.group.WORLD, ROWS // tp, case.vocabulary_size, case.sequence_parallel)
    loss, metrics = fused_linear_cross_entropy(hidden, weight, inputs.labels, inputs.mask, shard, case.chunk)
    assert loss._base is None and loss.dtype == metrics.dtype == torch.float32 and not metrics.requires_grad
    (loss * case.scale).backward()
    after = [tensor.detach() for tensor in (hidden, weight, inputs.labels, inputs.mask)]
    for was, now in zip(before, after, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True, msg="an input was written to")
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), metrics, hidden.grad, weight.grad


def compare(case: Case) -> None:
    inputs = make_inputs(case)
    exact_loss, exact_hidden, exact_weight = oracle(inputs, case.vocabulary_size)
    results = run_ranks(case.tp, on_a_rank, case, inputs)
    for loss, metrics, _, _ in results:
        assert torch.equal(loss, results[0][0]) and torch.equal(metrics, results[0][1])
    loss, metrics, d_hidden, _ = results[0]
    torch.testing.assert_close(loss.double(), exact_loss, rtol=case.tolerance, atol=1e-6)
    torch.testing.assert_close(metrics[:2], torch.stack((inputs.mask.sum(), loss)))
    if case.sequence_parallel:
        d_hidden = torch.cat([result[2] for result in results])
    d_weight = torch.cat([result[3] for result in results])
    assert d_hidden.dtype == d_weight.dtype == case.dtype
    if case.mask == "none":
        assert loss == 0 and not d_hidden.any() and not d_weight.any()
        return
    assert relative_error(d_hidden, exact_hidden * case.scale) < case.tolerance
    assert relative_error(d_weight, exact_weight * case.scale) < case.tolerance


LAYOUTS = [(1, False), (2, False), (2, True)]
VARIATIONS = {
    "one chunk": Case(chunk=1000),
    "chunk of one token": Case(chunk=1),
    "odd chunk, padding, factor": Case(chunk=7, vocabulary_size=50, scale=0.3),
    "last rank owns padding alone": Case(vocabulary_size=30, mask="weights"),
    "every token masked": Case(mask="none", vocabulary_size=50),
    "nothing masked, huge logits": Case(mask="all", logit_std=60.0),
}


@pytest.mark.parametrize("tp, sequence_parallel", LAYOUTS, ids=["tp1", "tp2", "tp2sp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", VARIATIONS)
def test_loss_and_gradients_equal_full_logits(name, dtype, tp, sequence_parallel):
    compare(replace(VARIATIONS[name], tp=tp, sequence_parallel=sequence_parallel, dtype=dtype))


def without_grad(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, int]:
    shard = VocabularyShard(dist.group.WORLD, ROWS // dist.get_world_size(), case.vocabulary_size, False)
    hidden = inputs.hidden.clone().requires_grad_()
    weight = inputs.weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    arguments = (hidden, weight, inputs.labels, inputs.mask, shard, case.chunk)
    with_grad, _ = fused_linear_cross_entropy(*arguments)
    with torch.no_grad(), Storages(arguments) as new:
        loss, _ = fused_linear_cross_entropy(*arguments)
    assert not loss.requires_grad
    return with_grad.detach(), loss, max(new.sizes)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_confident_token_keeps_its_gradient(tp, dtype, tolerance):
    """p - 1 = -1e-4 at the label. With a bfloat16 p it would be 0; with float32 logits of 100 it would be lost."""
    hidden, weight = torch.zeros(1, 1, HIDDEN, dtype=dtype), torch.zeros(ROWS, HIDDEN, dtype=dtype)
    hidden[0, 0, :2], weight[:, 0], weight[5, 1] = torch.tensor([8.0, 4.0]), 12.0, 3.25
    inputs = Inputs(hidden, weight, torch.tensor([5]), torch.ones(1))
    exact_loss, exact_hidden, exact_weight = oracle(inputs, ROWS)
    results = run_ranks(tp, on_a_rank, Case(dtype=dtype), inputs)
    torch.testing.assert_close(results[0][0].double(), exact_loss, rtol=tolerance, atol=0)
    assert relative_error(results[0][2][..., 1:], exact_hidden[..., 1:]) < tolerance
    assert relative_error(torch.cat([result[3] for result in results]), exact_weight) < tolerance


class Storages(TorchDispatchMode):
    """Records the bytes of each storage that an operation inside the block makes."""

    def __init__(self, known: tuple) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known if isinstance(tensor, Tensor)}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("tp", [1, 2])
def test_without_grad_the_loss_is_the_same_and_no_gradient_is_made(tp):
    case = Case(chunk=4, vocabulary_size=50)
    for with_grad, loss, largest in run_ranks(tp, without_grad, case, make_inputs(case)):
        assert torch.equal(with_grad, loss)
        # d(hidden) would have 12*3*16, d(weight) 64*16 / tp floats; a chunk's logits have 4*64
        assert largest <= 4 * ROWS * 4


def largest_storage(num_tokens: int, chunk: int, vocabulary_size: int, hidden_size: int) -> int:
    hidden = torch.randn(num_tokens, 1, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary_size, hidden_size, requires_grad=True)
    arguments = (
        hidden,
        weight,
        torch.zeros(num_tokens, dtype=torch.int64),
        torch.ones(num_tokens),
        VocabularyShard(dist.group.WORLD, vocabulary_size, vocabulary_size, False),
        chunk,
    )
    with Storages(arguments) as new:
        fused_linear_cross_entropy(*arguments)[0].backward()
    return max(new.sizes)


def test_the_largest_tensor_is_a_chunk_of_logits_however_many_tokens():
    for num_tokens in (64, 1024):
        assert run_ranks(1, largest_storage, num_tokens, 32, 512, 4) == [32 * 512 * 4]


def masked_rubbish(case: Case, inputs: Inputs) -> bool:
    clean = on_a_rank(case, inputs)
    masked = inputs.mask == 0
    hidden, labels = inputs.hidden.clone(), inputs.labels.clone()
    hidden.flatten(0, 1)[masked] = torch.tensor([float("nan"), float("inf")]).repeat(HIDDEN // 2).to(hidden)
    labels[masked] = torch.tensor([-100, 10**12]).repeat(len(labels))[: int(masked.sum())]
    rubbish = on_a_rank(case, inputs._replace(hidden=hidden, labels=labels))
    return all(torch.equal(a, b) for a, b in zip(clean, rubbish, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_masked_tokens_hold_changes_no_bit(dtype):
    case = Case(dtype=dtype, vocabulary_size=50)
    assert all(run_ranks(2, masked_rubbish, case, make_inputs(case)))


@pytest.mark.parametrize("label", [-1, 50, 63, 64])
def test_a_label_outside_the_vocabulary_gives_nan_and_not_a_wrong_loss(label):
    case = Case(vocabulary_size=50, mask="all")
    inputs = make_inputs(case)
    inputs.labels[5] = label
    for loss, _, d_hidden, _ in run_ranks(2, on_a_rank, case, inputs):
        assert loss.isnan() and d_hidden.isnan().any()


def at_two_scales(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return on_a_rank(case, inputs)[2], on_a_rank(replace(case, scale=0.3), inputs)[2]


def test_the_incoming_gradient_is_not_rounded_to_bfloat16():
    case = Case(dtype=torch.bfloat16)
    ((whole, scaled),) = run_ranks(1, at_two_scales, case, make_inputs(case))
    assert torch.equal((whole.float() * 0.3).bfloat16(), scaled)


class Alone:
    """A process group of one rank, without torch.distributed."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_device_equals_full_logits(dtype, device):
    case = Case(dtype=dtype, chunk=7, vocabulary_size=50)
    inputs = make_inputs(case)
    exact_loss, exact_hidden, exact_weight = oracle(inputs, case.vocabulary_size)
    hidden, weight, labels, mask = (tensor.to(device) for tensor in inputs)
    hidden.requires_grad_(), weight.requires_grad_()
    loss, _ = fused_linear_cross_entropy(hidden, weight, labels, mask, VocabularyShard(Alone(), ROWS, 50, False), case.chunk)
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), exact_loss, rtol=case.tolerance, atol=1e-6)
    assert relative_error(hidden.grad.cpu(), exact_hidden) < case.tolerance
    assert relative_error(weight.grad.cpu(), exact_weight) < case.tolerance


def backward_twice() -> None:
    hidden, weight = torch.randn(4, 1, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    shard = VocabularyShard(dist.group.WORLD, 16, 16, False)
    loss, _ = fused_linear_cross_entropy(hidden, weight, torch.arange(4), torch.ones(4), shard, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_backward_runs_once():
    run_ranks(1, backward_twice)


def gradient_of_a_subset(want_hidden: bool, want_weight: bool) -> tuple[bool, bool]:
    hidden, weight = torch.randn(4, 1, 8, requires_grad=want_hidden), torch.randn(16, 8, requires_grad=want_weight)
    shard = VocabularyShard(dist.group.WORLD, 16, 16, False)
    fused_linear_cross_entropy(hidden, weight, torch.arange(4), torch.ones(4), shard, 4)[0].backward()
    return hidden.grad is not None, weight.grad is not None


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["frozen weight", "frozen body"])
def test_only_what_requires_a_gradient_gets_one(wanted):
    assert run_ranks(1, gradient_of_a_subset, *wanted) == [wanted]
