"""The loss of the output head, forward and backward, with and without a teacher: time and peak memory against rivals.

    python benchmarks/kd_loss.py                  V = 32K, 1 thread: a few minutes
    python benchmarks/kd_loss.py --full           V = 32K, 128K and 256K, 1 thread and 2: about an hour; 256K takes 10 GiB
    python benchmarks/kd_loss.py --forms kd_probability kd_rank kd_entropy    the gates of --kd-gate, over the same without a gate
    python benchmarks/kd_loss.py --device cuda    on a GPU, see head_on_gpu.py; has not yet run on one

The rivals are described in head_rivals.py. All start from the same numbers and must reach the same loss and gradients.

On a CPU, times are medians over neighbouring pairs of runs: CPU seconds of the process with 1 thread, wall-clock seconds with 2. Memory
is the peak RSS of a child process minus its RSS before, one run each, with the gradients that remain.

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
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from benchmarks.head_on_gpu import GPU_RIVALS, GPU_SIZES, compare_on_gpu
from benchmarks.head_rivals import (
    DTYPES,
    GATES,
    OURS,
    TOLERANCE,
    Problem,
    Setting,
    Step,
    clear,
    difference,
    make_problem,
    make_step,
    run,
)
from benchmarks.results import above_zero, result, whole
from megatron_salt.model.loss_chunk import LEAST_GPU_TOKENS, gpu_tokens
from megatron_salt.parallel.launch import distributed, seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh

CHUNK = 256
CPU_SIZES = {"hidden_size": 512, "teacher_hidden_size": 384, "tokens": 1024}
RIVALS = {"kd": ("full", "chunks"), "alone": ("plain", "mcore")} | dict.fromkeys(GATES, ("kd",))
"""Of our form with a teacher, without one, and with a teacher and a gate, on a CPU."""

GOAL_TIME = {"full": 0.95, "chunks": 1.0, "plain": 1.1, "mcore": 1.1, "kd": 1.15}
GOAL_MEMORY = {"full": 0.35, "chunks": 0.35}


def main(arguments: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked.add_argument("--full", action="store_true", help="every vocabulary; on a CPU also 1 thread and 2, and more pairs")
    asked.add_argument("--vocabularies", nargs="+", type=whole, help="default: 32768")
    asked.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both; on a GPU bf16")
    asked.add_argument("--threads", nargs="+", type=whole, help="of a CPU; default: 1")
    asked.add_argument("--forms", nargs="+", choices=[*OURS, *GATES], default=list(OURS), help="of ours; default: kd alone")
    asked.add_argument("--rivals", nargs="+", choices=GPU_RIVALS["kd"] + GPU_RIVALS["alone"], help="on a GPU; default: all")
    asked.add_argument("--chunks", nargs="+", type=whole, help="of ours, on a GPU, in tokens; default: 2048 and a run's own")
    asked.add_argument("--hidden-size", type=whole, help="default: 512; on a GPU 2048")
    asked.add_argument("--teacher-hidden-size", type=whole, help="default: 384; on a GPU 1024")
    asked.add_argument("--tokens", type=whole, help="default: 1024; on a GPU 8192")
    asked.add_argument("--temperature", type=above_zero, default=1.0)
    asked.add_argument("--pairs", type=whole, help="of runs; default: 5, with --full 9; on a GPU 10 runs of each")
    asked.add_argument("--child", help=argparse.SUPPRESS)
    flags = asked.parse_args(arguments)
    if flags.child:
        child(json.loads(flags.child))
        return
    on_gpu = flags.device == "cuda"
    if torch.cuda.is_available() != on_gpu:
        there = "a GPU: hide it with CUDA_VISIBLE_DEVICES=" if torch.cuda.is_available() else "no GPU"
        print(f"{Path(__file__).name}: --device {flags.device}: this process sees {there}", file=sys.stderr)
        raise SystemExit(2)
    sizes = {name: getattr(flags, name) or size for name, size in (GPU_SIZES if on_gpu else CPU_SIZES).items()}
    settings = [
        Setting(
            vocabulary_size=size, dtype=dtype, temperature=flags.temperature, chunk_tokens=CHUNK, device=flags.device, **sizes
        )
        for size in flags.vocabularies or ([32768, 131072, 262144] if flags.full else [32768])
        for dtype in flags.dtypes or (["bf16"] if on_gpu else list(DTYPES))
    ]
    if on_gpu:
        with distributed(timedelta(minutes=5)):
            seed_everything(1, make_student_mesh(Layout()))
            for setting in settings:
                chunks = flags.chunks or [LEAST_GPU_TOKENS, gpu_tokens(DTYPES[setting.dtype].itemsize)]
                for ours in flags.forms:
                    compare_on_gpu(setting, ours, chunks, flags.rivals or GPU_RIVALS[ours], flags.pairs or 10)
        return
    for setting in settings:
        for threads in flags.threads or ([1, 2] if flags.full else [1]):
            timed = replace(setting, threads=threads, tokens=affordable_tokens(setting))
            for ours in flags.forms:
                compare(timed, ours, flags.pairs or (9 if flags.full else 5))


def affordable_tokens(setting: Setting) -> int:
    """The tokens asked for; fewer if this CPU has no fast bfloat16 products (without AVX512-BF16 or AMX, 50 times slower)."""
    if setting.dtype != "bf16":
        return setting.tokens
    seconds = {}
    for name, dtype in DTYPES.items():
        left, right = torch.ones(64, setting.hidden_size, dtype=dtype), torch.ones(1024, setting.hidden_size, dtype=dtype)
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
        hidden_mib = 3 * setting.tokens * setting.hidden_size * DTYPES[setting.dtype].itemsize / 2**20
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
        steps = [make_step(name, problem, setting.chunk_tokens) for name in order["names"]]
        error = difference(*(run(problem, step) for step in steps))  # which also warms up
        assert error < TOLERANCE[setting.dtype], f"not the same numbers: they differ by {error:.1e}"
        times: list[tuple[float, float]] = []
        for number in range(order["pairs"]):
            pair = [seconds_of(problem, step, setting.threads) for step in (steps if number % 2 else steps[::-1])]
            times.append((pair[0], pair[1]) if number % 2 else (pair[1], pair[0]))
        seconds = [statistics.median(pair[i] for pair in times) for i in range(2)]
        print(json.dumps({"seconds": seconds, "ratios": [ours / rival for ours, rival in times]}))


def seconds_of(problem: Problem, step: Step, threads: int) -> float:
    clear(problem)
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    step().backward()
    return clock() - start


def peak_mib(name: str, setting: Setting) -> float:
    """Peak RSS of one run minus the RSS before, after a tiny run that loads what is loaded late."""
    tiny = make_problem(replace(setting, vocabulary_size=256, tokens=32))
    make_step(name, tiny, setting.chunk_tokens)().backward()
    problem = make_problem(setting)
    step = make_step(name, problem, setting.chunk_tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_line("VmRSS")
    step().backward()
    return memory_line("VmHWM") - before


def memory_line(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
