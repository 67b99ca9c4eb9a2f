"""The loss of the output head, forward and backward, with and without a teacher: time and peak memory against rivals.

    python benchmarks/kd_loss.py           V = 32K, 1 thread: a few minutes
    python benchmarks/kd_loss.py --full    V = 32K, 128K and 256K, 1 thread and 2: about an hour; 256K takes 10 GiB

Rivals with a teacher: `full`, cross entropy of full logits against the mixed target q in plain PyTorch; and `chunks`, the same in
8 chunks of tokens through autograd, like torchtune's chunked losses. Without a teacher: `plain`, F.linear and F.cross_entropy; and
`mcore`, megatron-core's ColumnParallelLinear and vocab_parallel_cross_entropy. Rivals compute only the loss; ours computes all metrics
as well. All start from the same numbers and must reach the same loss and gradients.

Times are medians over neighbouring pairs of runs: CPU seconds of the process with 1 thread, wall-clock seconds with 2. Memory is the
peak RSS of a child process minus its RSS before, one run each, with the gradients that remain.

Limits. Time: the matrix products, which all need (with a teacher 4, about 85% of ours in float32), then exp, twice for each logit,
because probabilities do not outlive the all-gather between sums and gradient. Memory: two chunks of logits and the float32 weight
gradient [V/tp, h]. A bfloat16 rival holds that gradient in 2 bytes a number, ours in 4, and at the end both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from results import result
from torch import Tensor

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.model.loss import SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.launch import distributed, seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh

HIDDEN, TEACHER_HIDDEN, CHUNK = 512, 384, 256
KD_WEIGHT = 0.667
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RIVALS = {"kd": ("full", "chunks"), "alone": ("plain", "mcore")}
"""Of our form with a teacher and without one."""

GOAL_TIME = {"full": 0.95, "chunks": 1.0, "plain": 1.1, "mcore": 1.1}
GOAL_MEMORY = {"full": 0.35, "chunks": 0.35}


@dataclass(frozen=True)
class Setting:
    """What is measured, and with which sizes."""

    vocabulary_size: int
    dtype: str
    tokens: int
    threads: int
    temperature: float

    @property
    def name(self) -> str:
        return f"{self.vocabulary_size // 1024}K_{self.dtype}_{self.threads}thread"


@dataclass(frozen=True)
class Problem:
    """The tensors of a setting."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    mask: Tensor
    teacher: SoftTarget


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--full", action="store_true", help="every vocabulary, 1 thread and 2, more pairs")
    asked.add_argument("--vocabularies", nargs="+", type=int, help="default: 32768")
    asked.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    asked.add_argument("--threads", nargs="+", type=int, help="default: 1")
    asked.add_argument("--forms", nargs="+", choices=RIVALS, default=list(RIVALS), help="ours with a teacher, and without")
    asked.add_argument("--tokens", type=int, default=1024)
    asked.add_argument("--temperature", type=float, default=1.0)
    asked.add_argument("--pairs", type=int, help="default: 5, with --full 9")
    asked.add_argument("--child", help=argparse.SUPPRESS)
    flags = asked.parse_args()
    assert current_device().type == "cpu", "this benchmark is about the CPU"
    if flags.child:
        child(json.loads(flags.child))
        return
    vocabularies = flags.vocabularies or ([32768, 131072, 262144] if flags.full else [32768])
    for vocabulary_size in vocabularies:
        for dtype in flags.dtypes:
            for threads in flags.threads or ([1, 2] if flags.full else [1]):
                setting = Setting(vocabulary_size, dtype, flags.tokens, threads, flags.temperature)
                setting = replace(setting, tokens=affordable_tokens(setting))
                for ours in flags.forms:
                    compare(setting, ours, flags.pairs or (9 if flags.full else 5))


def affordable_tokens(setting: Setting) -> int:
    """The tokens asked for; fewer if this CPU has no fast bfloat16 products (without AVX512-BF16 or AMX, 50 times slower)."""
    if setting.dtype != "bf16":
        return setting.tokens
    seconds = {}
    for name, dtype in DTYPES.items():
        left, right = torch.ones(64, HIDDEN, dtype=dtype), torch.ones(1024, HIDDEN, dtype=dtype)
        left @ right.t()
        start = time.process_time()
        left @ right.t()
        seconds[name] = time.process_time() - start
    if seconds["bf16"] < 4 * seconds["fp32"]:
        return setting.tokens
    print(f"bfloat16 products are {seconds['bf16'] / seconds['fp32']:.0f} times slower than float32 on this CPU: 32 tokens")
    return 32


def compare(setting: Setting, ours: str, pairs: int) -> None:
    """Measure time and memory of one of our forms and its rivals; prints RESULT lines."""
    for rival in RIVALS[ours]:
        timing = in_child(setting, [ours, rival], pairs)
        spread = statistics.quantiles(timing["ratios"], n=4)
        memory = {name: in_child(setting, [name], 0)["mib"] for name in (ours, rival)}
        print(f"{setting.name:20} {setting.tokens} tokens  ours {ours:6} {timing['seconds'][0]:7.3f} s {memory[ours]:6.0f} MiB   "
              f"{rival:7} {timing['seconds'][1]:7.3f} s {memory[rival]:6.0f} MiB   quartiles of time {spread[0]:.3f}-{spread[2]:.3f}",
              flush=True)  # fmt: skip
        name = f"{setting.name}_{ours}_over_{rival}"
        result(f"seconds_{name}", statistics.median(timing["ratios"]), GOAL_TIME[rival], lower_is_better=True)
        if rival in GOAL_MEMORY and setting.tokens >= 4 * CHUNK:
            result(f"peak_mib_{name}", memory[ours] / memory[rival], GOAL_MEMORY[rival], lower_is_better=True)
    if setting.tokens >= 4 * CHUNK and setting.threads == 1:
        # What may grow with the tokens: d(hidden), a copy of it times the incoming gradient, the gradient that is left, and small
        # change; full logits would be V/h = 64 and more times that, several times over.
        more = replace(setting, tokens=4 * setting.tokens)
        grown = in_child(more, [ours], 0)["mib"] - in_child(setting, [ours], 0)["mib"]
        hidden_mib = 3 * setting.tokens * HIDDEN * DTYPES[setting.dtype].itemsize / 2**20
        result(f"growth_in_hidden_states_{setting.name}_{ours}", grown / hidden_mib, 8, lower_is_better=True)


def in_child(setting: Setting, names: list[str], pairs: int) -> dict:
    """The output of `child` in a process of its own."""
    order = json.dumps({"setting": asdict(setting), "names": names, "pairs": pairs})
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
    done = subprocess.run(
        [sys.executable, __file__, "--child", order], env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(order: dict) -> None:
    """Time pairs of two forms, or, without pairs, find the peak memory of one. Prints JSON."""
    setting = Setting(**order["setting"])
    torch.set_num_threads(setting.threads)
    with distributed(timedelta(minutes=5)):
        mesh = make_student_mesh(Layout())
        seed_everything(1, mesh)
        if not order["pairs"]:
            print(json.dumps({"mib": peak_mib(order["names"][0], setting)}))
            return
        problem = make_problem(setting)
        steps = [make_step(name, problem) for name in order["names"]]
        same_numbers(problem, steps, setting.dtype)
        times: list[tuple[float, float]] = []
        for number in range(order["pairs"]):
            pair = [seconds_of(problem, step, setting.threads) for step in (steps if number % 2 else steps[::-1])]
            times.append((pair[0], pair[1]) if number % 2 else (pair[1], pair[0]))
        seconds = [statistics.median(pair[i] for pair in times) for i in range(2)]
        print(json.dumps({"seconds": seconds, "ratios": [ours / rival for ours, rival in times]}))


def make_problem(setting: Setting) -> Problem:
    """Tensors with logits of standard deviation 1 (the teacher's 2); every token is valid.
    They are filled in place, because peak memory is measured after this."""
    generator, dtype = torch.Generator().manual_seed(3), DTYPES[setting.dtype]

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(std=std, generator=generator)

    hidden, weight = draw(setting.tokens, 1, HIDDEN), draw(setting.vocabulary_size, HIDDEN, std=HIDDEN**-0.5)
    teacher_hidden = draw(setting.tokens, 1, TEACHER_HIDDEN)
    teacher_weight = draw(setting.vocabulary_size, TEACHER_HIDDEN, std=2 * TEACHER_HIDDEN**-0.5)
    labels = torch.randint(0, setting.vocabulary_size, (setting.tokens,), generator=generator)
    teacher = SoftTarget(teacher_hidden, teacher_weight, setting.temperature, KD_WEIGHT)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), labels, torch.ones(setting.tokens), teacher)


Step = Callable[[], Tensor]
"""Forward; returns the summed loss, on which backward is called."""


def make_step(name: str, problem: Problem) -> Step:
    hidden, weight, labels, mask, teacher = vars(problem).values()
    shard = VocabularyShard(dist.group.WORLD, weight.size(0), weight.size(0), False)
    if name in RIVALS:
        given = teacher if name == "kd" else None
        return lambda: fused_linear_cross_entropy(hidden, weight, labels, mask, shard, CHUNK, given)[0]
    if name == "full":
        return lambda: full_logits(hidden[:, 0], weight, labels, mask, teacher.hidden[:, 0], teacher)
    if name == "chunks":
        return lambda: in_chunks(problem, 8)
    if name == "plain":
        return lambda: (F.cross_entropy(F.linear(hidden[:, 0], weight).float(), labels, reduction="none") * mask).sum()
    assert name == "mcore"
    layer = mcore_layer(weight)

    def mcore() -> Tensor:
        logits, _ = layer(hidden, weight=weight)
        return (tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels[:, None])[:, 0] * mask).sum()

    return mcore


def full_logits(
    hidden_nh: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, teacher_nh: Tensor, teacher: SoftTarget
) -> Tensor:
    """The formula: cross entropy against (1-w) onehot(label) + w softmax(teacher logits / T)."""
    logits = F.linear(hidden_nh, weight).float()
    with torch.no_grad():
        target = (F.linear(teacher_nh, teacher.weight).float() / teacher.temperature).softmax(-1).mul_(teacher.kd_weight)
        target.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), 1 - teacher.kd_weight))
    return (F.cross_entropy(logits, target, reduction="none") * mask).sum()


def in_chunks(problem: Problem, num_chunks: int) -> Tensor:
    """The way of torchtune: the logits of each chunk are computed and upcast separately; autograd keeps what backward needs."""
    parts = [
        part.chunk(num_chunks) for part in (problem.hidden[:, 0], problem.labels, problem.mask, problem.teacher.hidden[:, 0])
    ]
    losses = [
        full_logits(hidden, problem.weight, labels, mask, teacher_nh, problem.teacher)
        for hidden, labels, mask, teacher_nh in zip(*parts, strict=True)
    ]
    return torch.stack(losses).sum()


def mcore_layer(weight: Tensor) -> ColumnParallelLinear:
    """megatron-core's output layer, which gets its weight with each call."""
    bf16 = weight.dtype == torch.bfloat16
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        params_dtype=weight.dtype,
        pipeline_dtype=weight.dtype,
        bf16=bf16,
    )
    return ColumnParallelLinear(
        HIDDEN, weight.size(0), config=config, init_method=torch.nn.init.zeros_, bias=False, skip_weight_param_allocation=True
    )


def clear(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def same_numbers(problem: Problem, steps: list[Step], dtype: str) -> None:
    """Run each once, which also warms up, and compare loss and gradients."""
    tolerance, outcomes = (1e-5 if dtype == "fp32" else 2e-2), []
    for step in steps:
        clear(problem)
        loss = step()
        loss.backward()
        assert problem.hidden.grad is not None and problem.weight.grad is not None
        outcomes.append((loss.detach(), problem.hidden.grad, problem.weight.grad))
    for one, other in zip(*outcomes, strict=True):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        assert error < tolerance, f"not the same numbers: they differ by {error:.1e}"


def seconds_of(problem: Problem, step: Step, threads: int) -> float:
    clear(problem)
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    step().backward()
    return clock() - start


def peak_mib(name: str, setting: Setting) -> float:
    """Peak RSS of one run minus the RSS before, after a tiny run that loads what is loaded late."""
    tiny = make_problem(replace(setting, vocabulary_size=256, tokens=32))
    make_step(name, tiny)().backward()
    problem = make_problem(setting)
    step = make_step(name, problem)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_line("VmRSS")
    step().backward()
    return memory_line("VmHWM") - before


def memory_line(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
