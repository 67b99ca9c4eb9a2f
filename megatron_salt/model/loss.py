"""Cross entropy computed from hidden states, against the data and a teacher. No logits outlive a chunk of tokens.

With the teacher's distribution p = softmax(teacher logits / T) over the real ids, label y and weight w, the target is the mixture
q = (1-w) onehot(y) + w p; for a token outside the gate it is onehot(y). `fused_linear_cross_entropy` equals
`cross_entropy(hidden @ weight.T, q)`, summed over the mask, for weights that are sharded over the vocabulary. Without a teacher w = 0.
The forward pass also computes the gradients, for a loss of scale 1, if they are needed; the backward pass multiplies them by the
incoming gradient. So one pass over the logits gives the loss and the gradients, and nothing of the teacher is kept for the backward pass.

Rounding: the student's logits and their gradient are rounded to the model's dtype, as in megatron-core's output layer. The teacher's
logits are float32 out of the product: the division by T would multiply an error of rounding. Everything between is float32. The
weight gradient of each chunk is added to a float32 sum. On a CPU in bfloat16 (where no GEMM has a float32 result) the product of the
chunk is first rounded to bfloat16, as in megatron-core's layers, and then added in float32. A CPU without bfloat16 products multiplies
in float32 and adds the product without rounding, see matrix_products.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.tensor_parallel import layers

from megatron_salt.config.teaching import Gate
from megatron_salt.model import matrix_products
from megatron_salt.model.kernels.passes import Blocks, into_gradient, new_logits, slices
from megatron_salt.model.loss_chunk import even_chunk
from megatron_salt.model.vocab_parallel import Comparison, Softmax, VocabularyShard, compare, reduce

METRICS = ("tokens", "loss", "accuracy")
"""Sums over valid tokens that come with the loss, in this order: mask, loss, top-1 hits. Of n tied ids the label counts as 1/n."""

KD_METRICS = (*METRICS, "ce", "kl", "teacher_ce", "teacher_accuracy", "agreement")
"""The same sums with a teacher. loss: against the mixed target. ce: the student's cross entropy against the labels. kl: KL(teacher at its
temperature || student). teacher_ce, teacher_accuracy: the teacher's own, at temperature 1. agreement: both choose the same id."""

GATED_METRICS = (*KD_METRICS, "taught")
"""The same sums with a gate. taught: tokens inside it."""

NO_PROBABILITY = -1e20
"""A teacher's logit of an id that it does not share. exp() of it is 0 at any temperature, and 0 times it is 0: 0 times infinity is not."""


@dataclass(frozen=True)
class SoftTarget:
    """A teacher's part of the target of a batch: its hidden states, which become logits chunk by chunk."""

    hidden: Tensor
    """[s/tp, b, h_t] in the student's dtype: this rank's slice of the sequence, also without sequence parallelism."""

    weight: Tensor
    """[V/tp, h_t] in the student's dtype: the teacher's output weight for the student's rows, padding included."""

    temperature: float
    """The teacher's logits are divided by it; the student's are not."""

    kd_weight: float
    """w, the teacher's share of the target, from 0 to 1."""

    shared_ids: int | None = None
    """The teacher's distribution is over the ids below it. None: over all of the student's ids."""

    gate: Gate | None = None
    """Tokens outside it have w = 0. None: all tokens have w."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that come with the loss."""
        return KD_METRICS if self.gate is None else GATED_METRICS


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, shard: VocabularyShard, chunk_tokens: int,
    teacher: SoftTarget | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The masked sum of the loss, and `METRICS` (`KD_METRICS` with a teacher, `GATED_METRICS` with its gate).

    Collective over the tensor-parallel group; all its ranks receive. hidden: [s, b, h], with sequence parallelism [s/tp, b, h].
    weight: [V/tp, h]. Both are float32 or both bfloat16. labels: int64 [s*b]. mask: float32 [s*b], not negative. Both are s-major.
    Returns a float32 scalar and float32 [metrics] without a gradient. A token of mask 0 may hold anything in all inputs, NaN and ids
    outside the vocabulary included. A label outside the vocabulary where the mask is not 0 gives NaN. A teacher of weight 0, and one
    whose gate lets no token through, changes no bit of the loss and its gradients.

    If the weight has `main_grad`, the backward pass adds the gradient there, with the protocol of megatron-core's
    tensor_parallel/layers.py; otherwise autograd gets it. The backward pass runs once. The teacher gets no gradient.
    """
    assert hidden.dtype == weight.dtype and hidden.dtype in (torch.float32, torch.bfloat16), (hidden.dtype, weight.dtype)
    assert weight.size(0) == shard.rows and chunk_tokens > 0
    if teacher is not None:
        assert teacher.hidden.dtype == teacher.weight.dtype == hidden.dtype, (teacher.hidden.dtype, teacher.weight.dtype)
        assert teacher.weight.size(0) == shard.rows and teacher.temperature > 0 and 0 <= teacher.kd_weight <= 1
        num_tokens = teacher.hidden.size(0) * shard.group.size() * teacher.hidden.size(1)
        assert num_tokens == labels.numel(), (teacher.hidden.shape, labels.shape)
    # Read here: inside a Function grad mode is always off, and needs_input_grad ignores no_grad.
    wanted = torch.is_grad_enabled()
    return _FusedLinearCrossEntropy.apply(hidden, weight, labels, mask, shard, chunk_tokens, teacher, wanted)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, shard: VocabularyShard, chunk_tokens: int,
        teacher: SoftTarget | None, wanted: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        want_hidden, want_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        hidden_sbh = gather_sequence(hidden, shard.group) if shard.sequence_parallel else hidden
        all_tokens = hidden_sbh.reshape(-1, hidden.size(-1))
        real_weight = weight[: shard.real_rows]
        d_hidden = torch.empty_like(all_tokens) if want_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if want_weight else None
        size = even_chunk(all_tokens.size(0), chunk_tokens)
        buffer = new_logits(size, shard.real_rows, weight.dtype, weight.device)
        blocks = Blocks.of(buffer)
        teacher_logits = None if teacher is None else _TeacherLogits(teacher, mask, shard, size)
        sums = torch.zeros(len(METRICS if teacher is None else teacher.metrics), dtype=torch.float32, device=hidden.device)
        for chunk in slices(all_tokens.size(0), size):
            mask_n = mask[chunk]
            hidden_nh = torch.where(mask_n[:, None] > 0, all_tokens[chunk], 0)  # 0 * NaN would be NaN
            logits_nv = matrix_products.logits(hidden_nh, real_weight, buffer[: mask_n.size(0)])
            label_column = shard.column_of(torch.where(mask_n > 0, labels[chunk], 0))
            soft = None
            if teacher is None or teacher_logits is None:
                student = reduce(logits_nv, label_column, shard.group, blocks)
            else:
                teacher_nv = teacher_logits.of(chunk)
                student, comparison = compare(
                    logits_nv, teacher_nv, teacher.temperature, label_column, shard.group, blocks, teacher.gate
                )
                soft = _Soft(teacher_nv, comparison, teacher.temperature, teacher.kd_weight)
            _add_metrics(sums, mask_n, student, soft)
            if want_hidden or want_weight:
                gradient_nv = _into_gradient(logits_nv, label_column, mask_n, student, soft, blocks)
                if d_hidden is not None:
                    matrix_products.hidden_gradient(gradient_nv, real_weight, d_hidden[chunk])
                if d_weight is not None:
                    _add_product(d_weight[: shard.real_rows], gradient_nv, hidden_nh)
        if d_hidden is not None:
            d_hidden = _reduce_hidden(d_hidden.view_as(hidden_sbh), shard)
        ctx.d_hidden, ctx.d_weight, ctx.weight = d_hidden, d_weight, weight
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return sums[METRICS.index("loss")].clone(), sums  # megatron-core's schedule frees outputs and refuses a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, weight = ctx.d_hidden, ctx.d_weight, ctx.weight
        ctx.d_hidden = ctx.d_weight = ctx.weight = None
        if d_hidden is None and d_weight is None:
            raise RuntimeError("the output head's backward runs once: its gradients are gone")
        if d_hidden is not None:  # through float32: a bfloat16 product would round the factor too
            d_hidden = (d_hidden.float() * grad_loss).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = _deliver(weight, d_weight, grad_loss)
        return d_hidden, d_weight, None, None, None, None, None, None


def _deliver(weight: Tensor, d_weight: Tensor, scale: Tensor) -> Tensor | None:
    """The gradient that backward returns for the weight, after adding it to `main_grad` if the weight has one."""
    if not hasattr(weight, "main_grad"):
        return d_weight.mul_(scale).to(weight.dtype)
    if weight.main_grad.dtype == torch.float32:
        weight.main_grad.addcmul_(d_weight, scale)
    else:
        weight.main_grad.add_(d_weight.mul_(scale))
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        # Tied embeddings on one pipeline stage: the gradient of the embedding, [V/tp, h] too, always follows and runs the DDP hook once
        # for both. The hook adds what it gets to main_grad, so a dummy of the head would have to be zeros.
        return None
    return torch.empty_like(weight)  # the DDP hook of megatron-core runs when a gradient arrives; nobody reads this one


class _TeacherLogits:
    """The teacher's float32 logits of one chunk at a time, in one buffer."""

    def __init__(self, teacher: SoftTarget, mask: Tensor, shard: VocabularyShard, size: int) -> None:
        self.hidden = gather_sequence(teacher.hidden, shard.group).flatten(0, 1)
        self.weight = teacher.weight[: shard.real_rows]
        self.mask = mask
        self.buffer = new_logits(size, shard.real_rows, torch.float32, self.weight.device)
        shared = shard.vocabulary_size if teacher.shared_ids is None else teacher.shared_ids
        self.columns = max(0, min(shared - shard.first, shard.real_rows))

    def of(self, chunk: slice) -> Tensor:
        """float32 [n, real ids of this rank]; 0 where the mask is 0, and NO_PROBABILITY for ids that the teacher does not share. The next
        call overwrites them."""
        mask_n = self.mask[chunk]
        hidden_nh = torch.where(mask_n[:, None] > 0, self.hidden[chunk], 0)
        logits_nv = matrix_products.logits(hidden_nh, self.weight, self.buffer[: mask_n.size(0)])
        if self.columns < logits_nv.size(1):
            logits_nv[:, self.columns :] = NO_PROBABILITY
        return logits_nv


@dataclass(frozen=True)
class _Soft:
    """The teacher's part of the target of one chunk."""

    logits_nv: Tensor
    comparison: Comparison
    temperature: float
    weight: float

    def mix(self, label_term_n: Tensor, soft_term_n: Tensor) -> Tensor:
        """(1-w) * the label's term + w * the teacher's: exactly the label's where w = 0, and outside the gate."""
        mixed = (1 - self.weight) * label_term_n + self.weight * soft_term_n
        return self.gated(mixed, label_term_n)

    def gated(self, inside_n: Tensor, outside_n: Tensor | float) -> Tensor:
        """The first for tokens inside the gate, the second for the others."""
        gate = self.comparison.inside
        return inside_n if gate is None else torch.where(gate, inside_n, outside_n)


def _add_metrics(sums: Tensor, mask_n: Tensor, student: Softmax, soft: _Soft | None) -> None:
    """sums [metrics] += the chunk's `METRICS`, `KD_METRICS` or `GATED_METRICS`."""

    def masked(
        *terms_n: Tensor,
    ) -> Tensor:  # a call for each tuple, so that a teacher and a gate change no bit of the ones before
        return (torch.where(mask_n > 0, torch.stack(terms_n), 0) * mask_n).sum(-1)

    ce = -student.log_p
    loss = ce if soft is None else soft.mix(ce, student.log_sum - soft.comparison.mean_logit)
    sums[: len(METRICS)] += masked(torch.ones_like(ce), loss, student.hit)
    if soft is not None:
        teacher, agreement = soft.comparison.teacher, soft.comparison.agreement
        sums[len(METRICS) : len(KD_METRICS)] += masked(ce, soft.comparison.kl, -teacher.log_p, teacher.hit, agreement)
        if soft.comparison.inside is not None:
            sums[len(KD_METRICS) :] += masked(soft.comparison.inside.float())


def _into_gradient(
    logits_nv: Tensor, label_column: Tensor, mask_n: Tensor, student: Softmax, soft: _Soft | None, blocks: Blocks
) -> Tensor:
    """mask * (softmax(logits) - (1-w) onehot(label) - w p), written over the logits."""
    shift = student.largest + student.log_sum - mask_n.log()  # so that exp() gives mask * softmax
    at_label = torch.expm1(student.log_p)  # p - 1 without cancellation
    if soft is None:
        return into_gradient(logits_nv, None, label_column, mask_n * at_label, shift, None, None, 1.0, blocks)
    teacher = soft.comparison.teacher
    log_p_label = (teacher.label / soft.temperature) - soft.comparison.sum_exp.log()
    at_label = mask_n * soft.mix(at_label, student.log_p.exp() - log_p_label.exp())
    factor = soft.gated(mask_n * soft.weight / soft.comparison.sum_exp, 0.0)
    return into_gradient(
        logits_nv, soft.logits_nv, label_column, at_label, shift, teacher.largest, factor, soft.temperature, blocks
    )


def _add_product(total: Tensor, gradient_nv: Tensor, hidden_nh: Tensor) -> None:
    """total (float32 [v, h]) += gradient_nv^T @ hidden_nh."""
    if gradient_nv.dtype == total.dtype:
        total.addmm_(gradient_nv.t(), hidden_nh)
    elif total.is_cuda and layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden_nh, gradient_nv, total)
    elif total.is_cuda:  # needs torch 2.10; before that only apex has such a product
        torch.addmm(total, gradient_nv.t(), hidden_nh, out_dtype=torch.float32, out=total)
    else:
        matrix_products.add_weight_gradient(total, gradient_nv, hidden_nh)


def gather_sequence(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s, b, h] from every rank's [s/tp, b, h]. Collective over the group."""
    if group.size() == 1:
        return hidden
    whole = hidden.new_empty((hidden.size(0) * group.size(), *hidden.shape[1:]))
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
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
