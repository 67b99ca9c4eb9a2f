"""The output head's loss in our form and in its rivals' forms, for kd_loss.py and head_on_gpu.py.

With a teacher: `kd` is ours; `kd_probability`, `kd_rank` and `kd_entropy`, ours with a gate that lets every token through, which costs what
any bound does; `full`, cross entropy of full logits against the mixed target q in plain PyTorch; `compiled`, the same under
torch.compile; `chunks`, the same in 8 chunks of tokens through autograd, like torchtune's chunked losses. Without a teacher: `alone` is
ours; `plain`, F.linear and F.cross_entropy; `compiled_plain`, the same under torch.compile; `mcore`, megatron-core's ColumnParallelLinear
and vocab_parallel_cross_entropy; `liger`, Liger-Kernel's fused linear cross entropy, whose sums over chunks are float32, as ours are.
Rivals compute only the loss; ours computes all metrics as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.config.teaching import Gate
from megatron_salt.model.loss import SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard

KD_WEIGHT = 0.667
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = ("kd", "alone")
"""With a teacher, and without."""
GATES = {"kd_probability": Gate("probability", 1e-30), "kd_rank": Gate("rank", 2.0**31), "kd_entropy": Gate("entropy", 1e6)}
"""Ours with a teacher and a gate."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and with which sizes."""

    vocabulary_size: int
    dtype: str
    tokens: int
    temperature: float
    hidden_size: int
    teacher_hidden_size: int
    chunk_tokens: int
    """Of our form."""
    device: str = "cpu"
    threads: int = 1
    """Of a CPU."""

    @property
    def name(self) -> str:
        where = f"{self.threads}thread" if self.device == "cpu" else self.device
        return f"{self.vocabulary_size // 1024}K_{self.dtype}_{where}"


@dataclass(frozen=True)
class Problem:
    """The tensors of a setting."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    mask: Tensor
    teacher: SoftTarget


def make_problem(setting: Setting) -> Problem:
    """Tensors with logits of standard deviation 1 (the teacher's 2); every token is valid.
    They are filled in place, because peak memory is measured after this."""
    generator, dtype, device = torch.Generator(setting.device).manual_seed(3), DTYPES[setting.dtype], setting.device

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

    hidden = draw(setting.tokens, 1, setting.hidden_size)
    weight = draw(setting.vocabulary_size, setting.hidden_size, std=setting.hidden_size**-0.5)
    teacher_hidden = draw(setting.tokens, 1, setting.teacher_hidden_size)
    teacher_weight = draw(setting.vocabulary_size, setting.teacher_hidden_size, std=2 * setting.teacher_hidden_size**-0.5)
    labels = torch.randint(0, setting.vocabulary_size, (setting.tokens,), generator=generator, device=device)
    teacher = SoftTarget(teacher_hidden, teacher_weight, setting.temperature, KD_WEIGHT)
    mask = torch.ones(setting.tokens, device=device)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), labels, mask, teacher)


Step = Callable[[], Tensor]
"""Forward; returns the summed loss, on which backward is called."""


def make_step(name: str, problem: Problem, chunk_tokens: int) -> Step:
    """One of the forms that the module's docstring names. Raises ImportError where a rival is not installed."""
    hidden, weight, labels, mask, teacher = vars(problem).values()
    if name in OURS or name in GATES:
        shard = VocabularyShard(dist.group.WORLD, weight.size(0), weight.size(0), False)  # type: ignore[arg-type]
        given = None if name == "alone" else replace(teacher, gate=GATES.get(name))
        return lambda: fused_linear_cross_entropy(hidden, weight, labels, mask, shard, chunk_tokens, given)[0]
    if name in ("full", "compiled"):
        function = full_logits if name == "full" else torch.compile(full_logits, dynamic=False)
        return lambda: function(
            hidden[:, 0], weight, labels, mask, teacher.hidden[:, 0], teacher.weight, teacher.temperature, teacher.kd_weight
        )
    if name in ("plain", "compiled_plain"):
        alone = plain if name == "plain" else torch.compile(plain, dynamic=False)
        return lambda: alone(hidden[:, 0], weight, labels, mask)
    if name == "chunks":
        return lambda: in_chunks(problem, 8)
    if name == "liger":
        return liger(problem)
    assert name == "mcore", name
    return mcore(problem)


def full_logits(
    hidden_nh: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, teacher_nh: Tensor, teacher_weight: Tensor, temperature: float,
    kd_weight: float,
) -> Tensor:  # fmt: skip
    """The formula: cross entropy against (1-w) onehot(label) + w softmax(teacher logits / T)."""
    logits = F.linear(hidden_nh, weight).float()
    with torch.no_grad():
        target = (F.linear(teacher_nh, teacher_weight).float() / temperature).softmax(-1).mul_(kd_weight)
        target.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), 1 - kd_weight, device=labels.device))
    return (F.cross_entropy(logits, target, reduction="none") * mask).sum()


def plain(hidden_nh: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Full logits and torch's cross entropy."""
    return (F.cross_entropy(F.linear(hidden_nh, weight).float(), labels, reduction="none") * mask).sum()


def in_chunks(problem: Problem, num_chunks: int) -> Tensor:
    """The way of torchtune: the logits of each chunk are computed and upcast separately; autograd keeps what backward needs."""
    teacher = problem.teacher
    tensors = (problem.hidden[:, 0], problem.labels, problem.mask, teacher.hidden[:, 0])
    losses = [
        full_logits(hidden, problem.weight, labels, mask, teacher_nh, teacher.weight, teacher.temperature, teacher.kd_weight)
        for hidden, labels, mask, teacher_nh in zip(*(tensor.chunk(num_chunks) for tensor in tensors), strict=True)
    ]
    return torch.stack(losses).sum()


def liger(problem: Problem) -> Step:
    """Liger-Kernel's fused linear cross entropy (BSD 2-clause). It has no mask, and here every token is valid."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return lambda: loss(problem.weight, problem.hidden[:, 0], problem.labels)


def mcore(problem: Problem) -> Step:
    """megatron-core's output layer, which gets its weight with each call, and its cross entropy."""
    bf16 = problem.weight.dtype == torch.bfloat16
    rows, hidden_size = problem.weight.shape
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=4,
        use_cpu_initialization=True,
        params_dtype=problem.weight.dtype,
        pipeline_dtype=problem.weight.dtype,
        bf16=bf16,
    )
    layer = ColumnParallelLinear(
        hidden_size, rows, config=config, init_method=torch.nn.init.zeros_, bias=False, skip_weight_param_allocation=True
    )

    def step() -> Tensor:
        logits, _ = layer(problem.hidden, weight=problem.weight)
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), problem.labels[:, None])[:, 0]
        return (losses * problem.mask).sum()

    return step


class Outcome(NamedTuple):
    """Loss and gradients of one run."""

    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def run(problem: Problem, step: Step) -> Outcome:
    """Forward and backward from no gradients."""
    clear(problem)
    loss = step()
    loss.backward()
    assert problem.hidden.grad is not None and problem.weight.grad is not None
    return Outcome(loss.detach(), problem.hidden.grad, problem.weight.grad)


def clear(problem: Problem) -> None:
    """Drop the gradients."""
    problem.hidden.grad = problem.weight.grad = None


def difference(one: Outcome, other: Outcome) -> float:
    """The largest relative norm of a difference, over loss and gradients."""
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(one, other, strict=True))


TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Of `difference`, by the dtype of weights and hidden states."""
