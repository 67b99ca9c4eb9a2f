"""Hidden-state guidance: the loss term that pulls the output of one layer towards a teacher's last hidden states.

LET, arXiv 2602.05393. For each token that the loss mask counts, the term is lambda x (1 - cosine(x, t)): x is the residual stream after the
layer, t the teacher's last hidden state, interpolated linearly to the student's width (no learned projection). The term is summed over
tokens, as the cross entropy is, so the division by the global number of tokens, after the backward pass, is right for both.

The term enters where the layer ends: `guided` is the identity, and its backward pass adds the gradient. All arithmetic of the term is in
the backward pass, which each microbatch has once, also where recomputation runs the layer twice. What the term needs travels with the
microbatch as an argument (`Guide`), so a layer that runs again has the target of its own microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.utils import make_viewless_tensor

from megatron_salt.model.guidance.target import HiddenTarget
from megatron_salt.model.kernels.passes import slices
from megatron_salt.model.loss import gather_sequence

GUIDE_METRICS = ("tokens", "let_loss")
"""Sums over valid tokens: mask, 1 - cosine without lambda."""

_CHUNK_ELEMENTS = 1 << 22  # of float32 temporaries, [tokens, hidden size]


@dataclass(frozen=True)
class Guide:
    """Hidden-state guidance of one microbatch: what its backward pass needs, and where it leaves its metrics."""

    target: HiddenTarget
    mask: Tensor
    """float32 [b, s/cp]: the loss mask of this rank's positions."""
    sums: Tensor
    """float32 [len(GUIDE_METRICS)], written by the backward pass: over the tokens whose hidden states this rank holds."""

    @classmethod
    def of(cls, target: HiddenTarget, mask: Tensor) -> Guide:
        """The guidance of a microbatch that has not run."""
        return cls(target, mask, torch.zeros(len(GUIDE_METRICS), dtype=torch.float32, device=target.hidden.device))


def guided(hidden: Tensor, guide: Guide, sequence_parallel: bool, tp_group: dist.ProcessGroup) -> Tensor:
    """`hidden`, with the gradient of the term added in the backward pass.

    hidden: [s/cp, b, h], with sequence parallelism [s/(cp*tp), b, h]. Without it the backward pass is collective over the tensor-parallel
    group and gives all its ranks the same gradient. Where no gradients are wanted nothing is added.
    """
    if not torch.is_grad_enabled():
        return hidden
    out = _Guided.apply(hidden, guide, sequence_parallel, tp_group)
    return make_viewless_tensor(
        out, requires_grad=out.requires_grad, keep_graph=True
    )  # a stage may send it, and free it after that


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, guide: Guide, sequence_parallel: bool, tp_group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.guide, ctx.sequence_parallel, ctx.tp_group = guide, sequence_parallel, tp_group
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        guide: Guide = ctx.guide
        mask_sb, teacher = guide.mask.t(), guide.target.hidden
        if ctx.sequence_parallel:  # this rank's slice, as the teacher's hidden states are cut
            mask_sb = mask_sb.tensor_split(ctx.tp_group.size())[ctx.tp_group.rank()]
        else:
            teacher = gather_sequence(teacher, ctx.tp_group)
        assert hidden.shape[:2] == teacher.shape[:2] == mask_sb.shape, (hidden.shape, teacher.shape, mask_sb.shape)
        grad = add_gradient(grad, hidden, teacher, mask_sb, guide.target.weight, guide.sums)
        return grad, None, None, None


def add_gradient(grad: Tensor, hidden: Tensor, teacher: Tensor, mask_sb: Tensor, weight: float, sums: Tensor) -> Tensor:
    """`grad` + the gradient of the term for `hidden`. Writes the metrics to `sums`.

    grad, hidden: [s, b, h]; teacher: [s, b, h_t]; mask_sb: float32 [s, b]. A token of mask 0 may hold anything, NaN included. A vector of
    zeros has cosine 0 and no gradient. A weight of 0 changes no bit.
    """
    width = hidden.size(-1)
    grad_nh, hidden_nh = grad.reshape(-1, width), hidden.reshape(-1, width)
    teacher_nt, mask_n = teacher.reshape(-1, teacher.size(-1)), mask_sb.reshape(-1)
    result = torch.empty_like(grad_nh) if weight != 0 else None
    sums.zero_()
    for chunk in slices(mask_n.numel(), max(1, _CHUNK_ELEMENTS // width)):
        x, t, mask = hidden_nh[chunk].float(), stretched(teacher_nt[chunk].float(), width), mask_n[chunk]
        per_x, per_t = (_inverse(torch.linalg.vector_norm(vectors, dim=-1)) for vectors in (x, t))
        cosine = (x * t).sum(-1) * per_x * per_t
        sums += torch.where(mask > 0, torch.stack([torch.ones_like(cosine), 1 - cosine]) * mask, 0).sum(-1)
        if result is None:
            continue
        # d(1 - cosine)/dx = (cosine x/|x| - t/|t|) / |x|
        scale = weight * mask * per_x
        total = torch.addcmul(grad_nh[chunk].float(), x, (scale * cosine * per_x)[:, None])
        total.addcmul_(t, (-scale * per_t)[:, None])
        result[chunk] = torch.where(mask[:, None] > 0, total, grad_nh[chunk])
    return grad if result is None else result.view_as(grad)


def stretched(vectors: Tensor, width: int) -> Tensor:
    """float32 [n, width] by linear interpolation of float32 [n, h_t], without aligned corners.

    The paper's third-party readers normalise before it and after; `add_gradient` divides by the length once, which is the same direction.
    """
    if vectors.size(1) == width:
        return vectors
    # As the rows of one picture, which keep their places: torch's CUDA kernel for one dimension has a thread for each column, this one
    # for each element.
    return F.interpolate(vectors[None, None], size=(vectors.size(0), width), mode="bilinear", align_corners=False)[0, 0]


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1 / norm, 0)
