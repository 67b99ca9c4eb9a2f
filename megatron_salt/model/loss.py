"""Cross entropy straight from hidden states: no logits outlive a chunk of tokens.

`fused_linear_cross_entropy` equals `cross_entropy(hidden @ weight.T)` over the real vocabulary, summed over the mask, for
weights sharded over the vocabulary. Forward makes the gradients as well, for a loss of scale 1, and only where they are
wanted; backward multiplies them by the incoming gradient. So one pass over the logits serves loss and gradients.

Rounding: logits and their gradient are rounded to the model's dtype, as megatron-core's output layer does; everything
between is float32. Each chunk's weight gradient is added to a float32 sum. On a CPU in bfloat16 (where no GEMM has float32
output) the chunk's product is rounded to bfloat16 first, as in megatron-core's layers, and then added in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import megatron_salt.parallel.cpu  # noqa: F401  (before megatron: it makes CUDA literals mean the CPU)
from megatron.core.tensor_parallel import layers

METRICS = ("tokens", "loss")
KD_METRICS = (*METRICS, "ce", "kl", "teacher_ce", "teacher_accuracy", "agreement")
"""The sums over valid tokens that come with the loss, in this order: weight of the mask, loss."""

_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}  # float32 logits at one time: a CPU's cache; enough to hide a GPU's kernel launches


@dataclass(frozen=True)
class SoftTarget:
    """The teacher's part of a microbatch (helper A is writing what uses it)."""

    hidden: Tensor
    weight: Tensor
    temperature: float
    kd_weight: float


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the padded vocabulary a rank's weight holds, and how the hidden states of the group lie."""

    group: dist.ProcessGroup
    """The tensor-parallel group; rank r of it holds rows [r * rows, (r+1) * rows)."""

    rows: int
    """Rows of the weight on each rank, padding included."""

    num_valid: int
    """Real ids in the whole vocabulary. Padding takes no part in the loss and is never multiplied."""

    sequence_parallel: bool
    """Each rank has its own slice of the sequence, not all of it."""

    @property
    def first(self) -> int:
        """This rank's first id."""
        return self.group.rank() * self.rows

    @property
    def real_rows(self) -> int:
        """This rank's real ids; 0 where it holds padding alone."""
        return max(0, min(self.num_valid - self.first, self.rows))


def chunk_tokens_for_budget(mib: int, vocabulary_per_rank: int, dtype: torch.dtype) -> int:
    """Tokens whose logits fit in `mib` MiB: a multiple of 128 where so many fit, else of 8, at least 1.

    Two sets of logits count, a student's and a teacher's, also where there is no teacher: the size of a chunk decides how
    sums are rounded, and training without a teacher must equal, bit for bit, what follows when a teacher is freed.
    """
    tokens = (mib << 20) // (2 * vocabulary_per_rank * dtype.itemsize)
    for multiple in (128, 8):
        if tokens >= multiple:
            return tokens // multiple * multiple
    return max(1, tokens)


def weight_gradient_bytes(vocabulary_per_rank: int, hidden_size: int) -> int:
    """Bytes of the float32 weight gradient that lives between the head's forward and its backward; one at a time."""
    return 4 * vocabulary_per_rank * hidden_size


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, shard: VocabularyShard, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """The masked sum of the cross entropy, and `METRICS`. Collective over the tensor-parallel group; all its ranks get both.

    hidden [s, b, h] (with sequence parallelism [s/tp, b, h]), weight [V/tp, h], both float32 or both bfloat16; labels int64
    [s*b] and mask float32 [s*b], s-major, not negative. Returns a float32 scalar and float32 [len(METRICS)] without a gradient.
    A token of mask 0 may hold anything, NaN and ids of no vocabulary included; a label outside the vocabulary where the mask
    is not 0 gives NaN.

    A weight with `main_grad` gets its gradient there in backward, by the protocol of megatron-core's
    tensor_parallel/layers.py; another one through autograd. Backward runs once.
    """
    assert hidden.dtype == weight.dtype and hidden.dtype in (torch.float32, torch.bfloat16), (hidden.dtype, weight.dtype)
    assert weight.size(0) == shard.rows and chunk_tokens > 0
    # Asked here because inside a Function grad mode is always off, and needs_input_grad does not know about no_grad.
    wanted = torch.is_grad_enabled()
    return _FusedLinearCrossEntropy.apply(hidden, weight, labels, mask, shard, chunk_tokens, wanted)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, shard: VocabularyShard, chunk_tokens: int,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        hidden_sbh = _gather_sequence(hidden, shard)
        all_tokens = hidden_sbh.reshape(-1, hidden.size(-1))
        real_weight = weight[: shard.real_rows]
        d_hidden = torch.empty_like(all_tokens) if want_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if want_weight else None
        sums = torch.zeros(len(METRICS), dtype=torch.float32, device=hidden.device)
        size = _even_chunk(all_tokens.size(0), chunk_tokens)
        buffer = real_weight.new_empty((size, shard.real_rows))
        for chunk in _slices(all_tokens.size(0), size):
            mask_n = mask[chunk]
            hidden_nh = torch.where(mask_n[:, None] > 0, all_tokens[chunk], 0)  # 0 * NaN would be NaN
            logits_nv = torch.mm(hidden_nh, real_weight.t(), out=buffer[: mask_n.size(0)])
            label = _Label.of(labels[chunk], shard)
            log_sum_exp, log_p = _reduce_vocabulary(logits_nv, label, mask_n, shard.group)
            loss_n = torch.where(mask_n > 0, -log_p, 0)
            sums += (torch.stack((torch.ones_like(loss_n), loss_n)) * mask_n).sum(-1)
            if want_hidden or want_weight:
                gradient_nv = _into_gradient(logits_nv, label, mask_n, log_sum_exp, log_p)
                if d_hidden is not None:
                    torch.mm(gradient_nv, real_weight, out=d_hidden[chunk])
                if d_weight is not None:
                    _add_product(d_weight[: shard.real_rows], gradient_nv, hidden_nh)
        if d_hidden is not None:
            d_hidden = _reduce_hidden(d_hidden.view_as(hidden_sbh), shard)
        ctx.d_hidden, ctx.d_weight, ctx.weight = d_hidden, d_weight, weight
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return sums[METRICS.index("loss")].clone(), sums  # mcore's schedule frees outputs and refuses a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, weight = ctx.d_hidden, ctx.d_weight, ctx.weight
        ctx.d_hidden = ctx.d_weight = ctx.weight = None
        if d_hidden is None and d_weight is None:
            raise RuntimeError("the output head's backward runs once: its gradients are gone")
        if d_hidden is not None:  # by way of float32: a bfloat16 product would round the factor too
            d_hidden = (d_hidden.float() * grad_loss).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = _deliver(weight, d_weight, grad_loss)
        return d_hidden, d_weight, None, None, None, None, None


def _deliver(weight: Tensor, d_weight: Tensor, scale: Tensor) -> Tensor | None:
    """What backward returns for the weight, after adding its gradient to `main_grad` where it has one."""
    if not hasattr(weight, "main_grad"):
        return d_weight.mul_(scale).to(weight.dtype)
    if weight.main_grad.dtype == torch.float32:
        weight.main_grad.addcmul_(d_weight, scale)
    else:
        weight.main_grad.add_(d_weight.mul_(scale))
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    # mcore's DDP hook runs when a gradient arrives, so one has to. It adds it to main_grad only where zero_out_wgrad says that
    # the weight is used elsewhere too (tied embeddings): there this one must be zero, elsewhere its contents are never read.
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)


@dataclass(frozen=True)
class _Label:
    """The labels of a chunk, as this rank's ids."""

    here: Tensor
    """bool [n]: the label is among this rank's real ids."""

    index: Tensor
    """int64 [n, 1]: its row; an arbitrary valid one where it is not here."""

    @staticmethod
    def of(labels_n: Tensor, shard: VocabularyShard) -> _Label:
        local = labels_n - shard.first
        here = (local >= 0) & (local < shard.real_rows)
        return _Label(here, torch.where(here, local, 0)[:, None])


def _even_chunk(num_tokens: int, chunk_tokens: int) -> int:
    """At most `chunk_tokens`, so that as many chunks as that needs are about equal; a multiple of 16 where that fits."""
    num_chunks = max(1, -(-num_tokens // chunk_tokens))
    return min(chunk_tokens, -(-num_tokens // (16 * num_chunks)) * 16)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows, so many that a float32 copy of one stays small."""
    return _slices(matrix.size(0), max(1, _BLOCK[matrix.device.type] // max(1, matrix.size(1))))


def _reduce_vocabulary(
    logits_nv: Tensor, label: _Label, mask_n: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """log sum_v exp(logit_v) and the label's log-probability, float32 [n], over all ids: one MAX and one SUM over the group."""
    num_tokens, num_ids = logits_nv.shape
    largest = torch.full((num_tokens,), float("-inf"), dtype=torch.float32, device=logits_nv.device)
    sums = torch.zeros((3, num_tokens), dtype=torch.float32, device=logits_nv.device)
    sum_exp, target, owners = sums
    if num_ids:
        for rows in _blocks(logits_nv):
            largest[rows] = logits_nv[rows].amax(-1)
            sum_exp[rows] = (logits_nv[rows] - largest[rows, None]).exp_().sum(-1)
    if group.size() > 1:
        local = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sum_exp.mul_((local - largest).exp_())
    if num_ids:
        target.copy_(torch.where(label.here, logits_nv.gather(1, label.index)[:, 0] - largest, 0))
        owners.copy_(label.here)
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    log_sum = torch.where((owners > 0) | (mask_n == 0), sum_exp.log(), float("nan"))
    return largest + log_sum, target - log_sum  # not from one another: where p is near 1, that would cancel


def _into_gradient(logits_nv: Tensor, label: _Label, mask_n: Tensor, log_sum_exp: Tensor, log_p: Tensor) -> Tensor:
    """mask * (softmax(logits) - onehot(label)), over the logits in place."""
    if not logits_nv.size(1):
        return logits_nv
    shift = log_sum_exp - mask_n.log()  # so that exp() gives mask * softmax
    for rows in _blocks(logits_nv):
        logits_nv[rows] = (logits_nv[rows] - shift[rows, None]).exp_()
    at_label = (mask_n * torch.expm1(log_p)).to(logits_nv.dtype)  # p - 1 without cancellation
    # Not scatter_, which on a CPU in bfloat16 goes by way of a float32 copy of the whole chunk.
    label_ids = (torch.arange(logits_nv.size(0), device=logits_nv.device), label.index[:, 0])
    return logits_nv.index_put_(label_ids, torch.where(label.here, at_label, logits_nv[label_ids]))


def _add_product(total: Tensor, gradient_nv: Tensor, hidden_nh: Tensor) -> None:
    """total (float32 [v, h]) += gradient_nv^T @ hidden_nh."""
    if gradient_nv.dtype == total.dtype:
        total.addmm_(gradient_nv.t(), hidden_nh)
    elif total.is_cuda and layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden_nh, gradient_nv, total)
    elif total.is_cuda:  # from torch 2.10 on; before, only apex has it
        torch.addmm(total, gradient_nv.t(), hidden_nh, out_dtype=torch.float32, out=total)
    else:  # band by band, so that the rounded product is still in the cache when it is added
        for band in _slices(total.size(0), max(1, (1 << 20) // total.size(1))):
            total[band].add_(gradient_nv[:, band].t() @ hidden_nh)


def _gather_sequence(hidden: Tensor, shard: VocabularyShard) -> Tensor:
    """[s, b, h]; with sequence parallelism gathered from every rank's [s/tp, b, h]."""
    if not shard.sequence_parallel:
        return hidden
    whole = hidden.new_empty((hidden.size(0) * shard.group.size(), *hidden.shape[1:]))
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=shard.group)
    return whole


def _reduce_hidden(d_hidden_sbh: Tensor, shard: VocabularyShard) -> Tensor:
    """Sum over the group, [s, b, h]; with sequence parallelism each rank keeps its slice [s/tp, b, h]."""
    if shard.sequence_parallel:
        own = d_hidden_sbh.new_empty((d_hidden_sbh.size(0) // shard.group.size(), *d_hidden_sbh.shape[1:]))
        dist.reduce_scatter_tensor(own, d_hidden_sbh, group=shard.group)
        return own
    if shard.group.size() > 1:
        dist.all_reduce(d_hidden_sbh, group=shard.group)
    return d_hidden_sbh
