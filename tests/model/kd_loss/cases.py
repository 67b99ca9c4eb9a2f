"""Inputs of the fused loss with a teacher, the loss on a rank, and its oracle in float64, for the tests beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.config.teaching import Gate
from megatron_salt.model.loss import GATED_METRICS, KD_METRICS, METRICS, SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard

SEQUENCE, BATCH, HIDDEN, TEACHER_HIDDEN, ROWS = 12, 3, 16, 24, 64
TOKENS = SEQUENCE * BATCH


@dataclass(frozen=True)
class Case:
    tp: int = 1
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    chunk: int = 7
    vocabulary_size: int = 50
    mask: str = "weights"
    temperature: float = 1.0
    kd_weight: float = 0.667
    shared_ids: int | None = None
    """Ids that the teacher has; None: all of the student's."""
    gate: Gate | None = None

    @property
    def tolerance(self) -> float:
        """Tolerance of a gradient, see test_loss.py. The teacher's logits are float32; the temperature divides their error."""
        return {torch.float32: 5e-7 * max(1.0, 1 / self.temperature), torch.bfloat16: 8e-3}[self.dtype]


class Inputs(NamedTuple):
    hidden: Tensor  # [s, b, h]
    weight: Tensor  # [ROWS, h], rows from vocabulary_size on hold arbitrary values
    labels: Tensor  # [s*b]
    mask: Tensor  # [s*b]
    teacher_hidden: Tensor  # [s, b, h_t]
    teacher_weight: Tensor  # [ROWS, h_t], arbitrary values in the same rows


class Outputs(NamedTuple):
    loss: Tensor
    metrics: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, teacher_weight = draw(ROWS, HIDDEN) * 1.5 / HIDDEN**0.5, draw(ROWS, TEACHER_HIDDEN) * 1.5 / TEACHER_HIDDEN**0.5
    labels = torch.randint(0, case.shared_ids or case.vocabulary_size, (TOKENS,), generator=generator)
    uniform = torch.rand(TOKENS, generator=generator)
    mask = {"all": (uniform > -1), "weights": uniform.round(decimals=1) * (uniform > 0.3), "none": (uniform > 1)}[
        case.mask
    ].float()
    weight[case.vocabulary_size :] = teacher_weight[case.vocabulary_size :] = float("nan")
    floats = draw(SEQUENCE, BATCH, HIDDEN), weight, draw(SEQUENCE, BATCH, TEACHER_HIDDEN), teacher_weight
    hidden, weight, teacher_hidden, teacher_weight = (tensor.to(case.dtype) for tensor in floats)
    return Inputs(hidden, weight, labels, mask, teacher_hidden, teacher_weight)


def oracle(inputs: Inputs, case: Case) -> Outputs:
    """Oracle: cross entropy against the mixed target, from full logits in float64."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (inputs.hidden, inputs.weight[: case.vocabulary_size]))
    logits = (hidden @ weight.t()).flatten(0, 1)
    teacher = (inputs.teacher_hidden.double() @ inputs.teacher_weight[: case.vocabulary_size].double().t()).flatten(0, 1)
    if case.shared_ids is not None:
        teacher[:, case.shared_ids :] = -1e6
    log_q, log_p = logits.log_softmax(-1), (teacher / case.temperature).log_softmax(-1)
    label = inputs.labels[:, None]
    ce, teacher_ce = -log_q.gather(1, label)[:, 0], -teacher.log_softmax(-1).gather(1, label)[:, 0]
    inside = inside_gate(case.gate, teacher, inputs.labels)
    w = torch.where(inside, case.kd_weight, 0.0)[:, None]
    target = (1 - w) * torch.zeros_like(log_p).scatter(1, label, 1.0) + w * log_p.exp()
    terms = {
        "tokens": torch.ones_like(ce),
        "loss": -(target * log_q).sum(-1),
        "accuracy": logits.argmax(-1) == inputs.labels,
        "ce": ce,
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "teacher_ce": teacher_ce,
        "teacher_accuracy": teacher.argmax(-1) == inputs.labels,
        "agreement": teacher.argmax(-1) == logits.argmax(-1),
        "taught": inside,
    }
    names = KD_METRICS if case.gate is None else GATED_METRICS
    metrics = torch.stack([(terms[name] * inputs.mask.double()).sum() for name in names])
    metrics[METRICS.index("loss")].backward()
    assert hidden.grad is not None and weight.grad is not None
    d_weight = torch.zeros(inputs.weight.shape, dtype=torch.float64)
    d_weight[: case.vocabulary_size] = weight.grad
    return Outputs(metrics[METRICS.index("loss")].detach(), metrics.detach(), hidden.grad, d_weight)


def inside_gate(gate: Gate | None, teacher: Tensor, labels: Tensor) -> Tensor:
    """bool [n]: the tokens that a gate lets through, by the teacher's logits [n, v] in float64, sorted and summed in the plain way."""
    if gate is None:
        return torch.ones(len(labels), dtype=torch.bool)
    p, label = teacher.softmax(-1), labels[:, None]
    if gate.kind == "probability":
        return p.gather(1, label)[:, 0] >= gate.bound
    if gate.kind == "rank":
        return (teacher > teacher.gather(1, label)).sum(-1) < gate.bound
    return torch.special.entr(p).sum(-1) <= gate.bound


def call(case: Case, inputs: Inputs, hidden: Tensor, weight: Tensor, with_teacher: bool = True) -> tuple[Tensor, Tensor]:
    tp, rank = dist.get_world_size(), dist.get_rank()
    shard = VocabularyShard(dist.group.WORLD, ROWS // tp, case.vocabulary_size, case.sequence_parallel)
    teacher = (
        SoftTarget(
            inputs.teacher_hidden.chunk(tp)[rank].clone(),
            inputs.teacher_weight.chunk(tp)[rank].clone(),
            case.temperature,
            case.kd_weight,
            case.shared_ids,
            case.gate,
        )
        if with_teacher
        else None
    )
    before = () if teacher is None else (teacher.hidden.clone(), teacher.weight.clone())
    result = fused_linear_cross_entropy(hidden, weight, inputs.labels, inputs.mask, shard, case.chunk, teacher)
    if teacher is not None:
        for was, now in zip(before, (teacher.hidden, teacher.weight), strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True, msg="the teacher was written to")
    return result


def own(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """This rank's hidden states and weight."""
    tp, rank = dist.get_world_size(), dist.get_rank()
    hidden = inputs.hidden.chunk(tp)[rank] if case.sequence_parallel else inputs.hidden
    return hidden.clone().requires_grad_(), inputs.weight.chunk(tp)[rank].clone().requires_grad_()


def on_a_rank(case: Case, inputs: Inputs, with_teacher: bool = True) -> Outputs:
    hidden, weight = own(case, inputs)
    loss, metrics = call(case, inputs, hidden, weight, with_teacher)
    assert loss._base is None and loss.dtype == metrics.dtype == torch.float32 and not metrics.requires_grad
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Outputs(loss.detach(), metrics, hidden.grad, weight.grad)
