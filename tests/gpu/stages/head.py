"""Stages of the output head: its loss and gradients against float64, and its time by the size of a chunk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.head_on_gpu import GPU_RIVALS, why_not
from benchmarks.head_rivals import Problem as RivalProblem
from benchmarks.head_rivals import Setting as RivalSetting
from benchmarks.head_rivals import clear, make_problem, make_step
from megatron_salt.config.teaching import Gate, GateKind
from megatron_salt.model.loss import KD_METRICS, SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.device import current_device
from tests.gpu.stages.runner import Report, Setting
from tests.gpu.stages.small_model import DTYPES, one_rank

LOSS = {"fp32": 1e-5, "bf16": 5e-3}
"""Relative tolerance of the loss against float64."""
GRADIENT = {"fp32": 2e-5, "bf16": 5e-3}
"""The same of the norm of a gradient's error over the norm of the gradient."""
OFFSET = 3e-3
"""The same of d_hidden with a sharp teacher, whatever is added to all of its logits."""
KD_WEIGHT = 0.667


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem."""

    vocabulary_size: int
    tokens: int
    hidden: int
    teacher_hidden: int

    @property
    def rows(self) -> int:
        """Rows of the weight: padding up to a multiple of 128."""
        return -(-self.vocabulary_size // 128) * 128


EXACT = [Shape(size, 512, 256, 128) for size in (32000, 50257, 128256)]
TINY_EXACT = [Shape(size, 48, 32, 16) for size in (500, 1003)]
TIMED = Shape(128256, 8192, 2048, 1024)
TINY_TIMED = Shape(1003, 64, 32, 16)


@dataclass(frozen=True)
class Problem:
    """Hidden states, weights and labels of both models. Tokens of mask 0 and rows of padding hold NaN."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    mask: Tensor
    teacher: SoftTarget


def make(shape: Shape, dtype: str, temperature: float, offset: float = 0.0) -> Problem:
    """Draw a problem on the device of this process. offset: added to all logits of the teacher."""
    device = current_device()
    generator = torch.Generator(device).manual_seed(7)

    def draw(*sizes: int, std: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * std).to(DTYPES[dtype])

    mask = (torch.rand(shape.tokens, generator=generator, device=device) > 0.3).float()
    labels = torch.randint(0, shape.vocabulary_size, (shape.tokens,), generator=generator, device=device)
    hidden, weight = draw(shape.tokens, 1, shape.hidden), draw(shape.rows, shape.hidden, std=1.5 / shape.hidden**0.5)
    soft = draw(shape.tokens, 1, shape.teacher_hidden)
    soft_weight = draw(shape.rows, shape.teacher_hidden, std=2 / shape.teacher_hidden**0.5)
    soft[..., 0], soft_weight[:, 0] = 1, offset  # exact in bfloat16
    for tensor in (hidden, soft):
        tensor[mask == 0] = float("nan")
    for tensor in (weight, soft_weight):
        tensor[shape.vocabulary_size :] = float("nan")
    return Problem(
        shape, hidden, weight, torch.where(mask > 0, labels, -5), mask, SoftTarget(soft, soft_weight, temperature, KD_WEIGHT)
    )


@dataclass(frozen=True)
class Result:
    """Loss, gradients and mean KL divergence of a problem."""

    loss: float
    d_hidden: Tensor
    d_weight: Tensor
    kl: float


def fused(problem: Problem, teacher: SoftTarget | None, chunk_tokens: int) -> Result:
    """What the head computes."""
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    shard = VocabularyShard(dist.group.WORLD, problem.shape.rows, problem.shape.vocabulary_size, False)
    loss, sums = fused_linear_cross_entropy(hidden, weight, problem.labels, problem.mask, shard, chunk_tokens, teacher)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    kl = 0.0 if teacher is None else float(sums[KD_METRICS.index("kl")] / sums[KD_METRICS.index("tokens")])
    return Result(float(loss.detach()), hidden.grad[:, 0], weight.grad[: problem.shape.vocabulary_size], kl)


def in_float64(problem: Problem, teacher: SoftTarget | None) -> Result:
    """Oracle: the formula over full logits, for the valid tokens alone."""
    valid = problem.mask > 0
    weight = problem.weight[: problem.shape.vocabulary_size].double()
    hidden = problem.hidden[valid, 0].double()
    logits = hidden @ weight.t()
    labels = torch.nn.functional.one_hot(problem.labels[valid], weight.size(0)).double()
    target, kl = labels, 0.0
    if teacher is not None:
        soft_logits = teacher.hidden[valid, 0].double() @ teacher.weight[: weight.size(0)].double().t()
        p = (soft_logits / teacher.temperature).softmax(-1)
        kl = float((torch.special.xlogy(p, p) - p * logits.log_softmax(-1)).sum(-1).mean())
        w = torch.where(inside(problem, teacher), teacher.kd_weight, 0.0)[:, None]
        target = (1 - w) * labels + w * p
    loss = float((logits.logsumexp(-1) - (target * logits).sum(-1)).sum())
    gradient = logits.softmax(-1) - target
    d_hidden = torch.zeros(problem.hidden.size(0), hidden.size(1), dtype=torch.float64, device=hidden.device)
    d_hidden[valid] = gradient @ weight
    return Result(loss, d_hidden, gradient.t() @ hidden, kl)


def figures(problem: Problem, teacher: SoftTarget) -> dict[GateKind, Tensor]:
    """What a gate asks of the teacher, by kind: float64 [valid tokens] each, from full logits."""
    valid, size = problem.mask > 0, problem.shape.vocabulary_size
    logits, label = teacher.hidden[valid, 0].double() @ teacher.weight[:size].double().t(), problem.labels[valid, None]
    p = logits.softmax(-1)
    return {
        "probability": p.gather(1, label)[:, 0],
        "rank": (logits > logits.gather(1, label)).sum(-1).double(),
        "entropy": torch.special.entr(p).sum(-1),
    }


def inside(problem: Problem, teacher: SoftTarget) -> Tensor:
    """bool [valid tokens]: those that the teacher's gate lets through; all without one."""
    if teacher.gate is None:
        return torch.ones_like(problem.mask[problem.mask > 0], dtype=torch.bool)
    values = figures(problem, teacher)[teacher.gate.kind]
    return values >= teacher.gate.bound if teacher.gate.kind == "probability" else values < teacher.gate.bound


def gates(problem: Problem) -> list[Gate]:
    """A gate of each kind. Its bound is in the widest gap between the middle half of the figures, so that rounding decides nothing."""
    found = []
    for kind, values in figures(problem, problem.teacher).items():
        quarter = values.numel() // 4
        middle = values.sort().values[quarter : values.numel() - quarter]
        widest = int(middle.diff().argmax())
        found.append(Gate(kind, float(middle[widest : widest + 2].mean())))
    return found


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor."""
    return float((found.double() - exact).norm() / exact.norm())


def exact(setting: Setting, report: Report) -> None:
    """Loss and gradients against float64, also with each gate; with weight 0 the bits of a plain loss; a teacher equal to the student has
    divergence 0."""
    rows = []
    with one_rank():
        for shape in TINY_EXACT if setting.tiny else EXACT:
            chunk = shape.tokens // 3  # several chunks, and a smaller last one
            for dtype in DTYPES:
                for temperature in (None, 1.0, 0.25):
                    problem = make(shape, dtype, temperature or 1.0)
                    teacher = None if temperature is None else problem.teacher
                    rows.append(_errors(report, f"V {shape.vocabulary_size} {dtype} T {temperature or '-'}", dtype,
                                        fused(problem, teacher, chunk), in_float64(problem, teacher)))  # fmt: skip
                for gate in gates(problem):
                    gated = replace(problem.teacher, gate=gate)
                    rows.append(_errors(report, f"V {shape.vocabulary_size} {dtype} gate {gate.kind}", dtype,
                                        fused(problem, gated, chunk), in_float64(problem, gated)))  # fmt: skip
                _bits(report, make(shape, dtype, 0.25), chunk, f"V {shape.vocabulary_size} {dtype}")
            same = make(shape, "fp32", 1.0)
            kl = fused(same, SoftTarget(same.hidden, same.weight, 1.0, KD_WEIGHT), chunk).kl
            report.require(abs(kl) < 1e-6, f"V {shape.vocabulary_size}: the divergence of a model from itself is {kl:g}")
        last = (TINY_EXACT if setting.tiny else EXACT)[-1]
        for offset in (0.0, 30.0, 60.0):
            problem = make(last, "bf16", 0.25, offset)
            found, wanted = fused(problem, problem.teacher, last.tokens), in_float64(problem, problem.teacher)
            rows.append(
                {"case": f"bf16 T 0.25, teacher's logits + {offset:g}", "d_hidden": error(found.d_hidden, wanted.d_hidden)}
            )
    report.note(errors=rows)


def _errors(report: Report, case: str, dtype: str, found: Result, wanted: Result) -> dict[str, float | str]:
    """A row of errors; problems where they are above their tolerances."""
    row: dict[str, float | str] = {"case": case, "loss": abs(found.loss / wanted.loss - 1)}
    row |= {"d_hidden": error(found.d_hidden, wanted.d_hidden), "d_weight": error(found.d_weight, wanted.d_weight)}
    for name, limit in (("loss", LOSS[dtype]), ("d_hidden", GRADIENT[dtype]), ("d_weight", GRADIENT[dtype])):
        report.require(float(row[name]) < limit, f"{case}: the error of {name} is {row[name]:.2g}, above {limit:g}")
    return row


def _bits(report: Report, problem: Problem, chunk_tokens: int, case: str) -> None:
    """A teacher of weight 0 changes no bit."""
    plain, weightless = (
        fused(problem, None, chunk_tokens),
        fused(problem, replace(problem.teacher, kd_weight=0.0), chunk_tokens),
    )
    same = plain.loss == weightless.loss and all(
        torch.equal(getattr(plain, name), getattr(weightless, name)) for name in ("d_hidden", "d_weight")
    )
    report.require(same, f"{case}: a teacher of weight 0 changes bits")


# ---- time ------------------------------------------------------------------------------------------------------------------------


def times(setting: Setting, report: Report) -> None:
    """Microseconds a token of forward and backward pass, by chunk size, with a teacher and without; the goal is 600 TFLOP/s."""
    shape = TINY_TIMED if setting.tiny else TIMED
    rows = []
    with one_rank():
        problem = make(shape, "bf16", 0.25)
        for chunk in (16, 64) if setting.tiny else (256, 512, 1024, 2048, 4096):
            for form, teacher in (("with a teacher", problem.teacher), ("plain", None)):
                seconds = seconds_of(training_step(problem, teacher, chunk))
                rows.append(row_of(f"chunks of {chunk}", form, shape, seconds, teacher is not None))
        del problem
        rows += rivals(shape, {"kd": ("chunks",), "alone": ("plain", "liger")} if setting.tiny else GPU_RIVALS)
    report.note(shape=str(shape), goal="at least 600 TFLOP/s", times=rows)


def rivals(shape: Shape, names: Mapping[str, Sequence[str]]) -> list[dict[str, float | str]]:
    """Rows of the rivals of benchmarks/kd_loss.py, or why one is not here. names: of those with a teacher ("kd"), and without."""
    sizes = RivalSetting(
        vocabulary_size=shape.vocabulary_size, dtype="bf16", tokens=shape.tokens, temperature=0.25, hidden_size=shape.hidden,
        teacher_hidden_size=shape.teacher_hidden, chunk_tokens=shape.tokens, device=current_device().type,
    )  # fmt: skip
    problem, rows = make_problem(sizes), []
    for form, with_teacher in (("kd", True), ("alone", False)):
        for name in names[form]:
            words = "with a teacher" if with_teacher else "plain"
            try:
                step = partial(forward_and_backward, problem, make_step(name, problem, shape.tokens))
                rows.append(row_of(name, words, shape, seconds_of(step), with_teacher))
            except Exception as error:  # whatever a rival does, the others are measured
                rows.append({"head": name, "form": words, "not here": why_not(error)})
            clear(problem)
    return rows


def forward_and_backward(problem: RivalProblem, step: Callable[[], Tensor]) -> None:
    """One step of a rival from no gradients."""
    clear(problem)
    step().backward()


def row_of(name: str, form: str, shape: Shape, seconds: float, with_teacher: bool) -> dict[str, float | str]:
    """A row of the table of times."""
    flops = shape.tokens * shape.vocabulary_size * (6 * shape.hidden + (2 * shape.teacher_hidden if with_teacher else 0))
    return {"head": name, "form": form, "us a token": seconds * 1e6 / shape.tokens, "TFLOP/s": flops / seconds / 1e12}


def training_step(problem: Problem, teacher: SoftTarget | None, chunk_tokens: int) -> Callable[[], None]:
    """Forward and backward pass, with the float32 gradient buffer that training has."""
    hidden, weight = problem.hidden.nan_to_num().requires_grad_(), problem.weight.nan_to_num().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    mask, labels = torch.ones_like(problem.mask), problem.labels.clamp(min=0)
    shard = VocabularyShard(dist.group.WORLD, problem.shape.rows, problem.shape.vocabulary_size, False)
    if teacher is not None:
        teacher = replace(teacher, hidden=teacher.hidden.nan_to_num(), weight=teacher.weight.nan_to_num())

    def step() -> None:
        hidden.grad = weight.grad = None
        fused_linear_cross_entropy(hidden, weight, labels, mask, shard, chunk_tokens, teacher)[0].backward()

    return step


def seconds_of(step: Callable[[], None], repeats: int = 5) -> float:
    """The median over some calls, after two that warm up."""
    seconds = []
    for number in range(2 + repeats):
        start = now()
        step()
        if number >= 2:
            seconds.append(now() - start)
    return statistics.median(seconds)


def now() -> float:
    """Seconds of the clock, once the device has done what it was told."""
    if current_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
