"""The output head's memory traffic, counted, and the time that a GPU needs at least for it, estimated. Needs no GPU.

    python benchmarks/head_roofline.py                           counts, and estimates for an H100: half a minute
    python benchmarks/head_roofline.py --operations              the same, and which operation moves how much
    python benchmarks/head_roofline.py --card "NVIDIA B200" --chunks 4096 8192

Two paths: torch's operations, as a CPU runs them, and the kernels of a GPU in Triton's interpreter. head_bytes.py counts both, each in
a process of its own. Goals: the kernels' passes over logits move at most 16 bytes a logit with a teacher, and 8 without.

The second table is an estimate and no measurement. Each product takes the longer of its arithmetic and its traffic; the passes over
logits take their counted bytes. The rates are the part of a data sheet's peaks that megatron_salt/cards.py counts on, or those of
--tflops and --gb-per-s. A product reads the weight once a chunk; the weight's gradient, float32, is read and written once a chunk, zeroed
once a microbatch, and added to main_grad once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import above_zero, result, whole
from megatron_salt.cards import CARDS, Rates, reached
from megatron_salt.model.loss_chunk import CPU_MIB, gpu_tokens, tokens_within

PATHS = {"torch": "0", "kernels": "1"}
"""The value of TRITON_INTERPRET with which a CPU counts each."""
GOALS = {"kd, T 1": 16, "kd, T 0.25": 16, "kd, T 0.25, rank": 20, "kd, T 0.25, entropy": 16, "plain": 8}
"""Bytes a logit of the kernels' passes, at most."""
SUMS, PRODUCTS = "passes", "products"

Counts = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By form of the head, then "passes" or "products", then operation: bytes a logit."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The output head of one rank, and its work in one microbatch."""

    name: str
    rows: int
    """Ids on the rank: V / tp."""
    hidden_size: int
    teacher_hidden_size: int
    microbatch_tokens: int


@dataclass(frozen=True, kw_only=True)
class LogitBytes:
    """Bytes a logit, as counted."""

    passes: float
    """Of all passes over logits."""
    student: float
    """Of one logit of the student in memory, which three products write or read."""
    teacher: float
    """Of one of the teacher's, which one product writes; 0 without a teacher."""


@dataclass(frozen=True, kw_only=True)
class HeadTimes:
    """Microseconds a token."""

    forward: float
    hidden_gradient: float
    weight_gradient: float
    teacher: float
    passes: float
    main_grad: float
    """Zeroing the weight's gradient, and adding it to main_grad."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


SHAPES = (
    HeadShape(name="V 131072, h 4096", rows=131072, hidden_size=4096, teacher_hidden_size=2048, microbatch_tokens=4096),
    HeadShape(name="V 131072, h 4096, tp 8", rows=16384, hidden_size=4096, teacher_hidden_size=2048, microbatch_tokens=4096),
    HeadShape(
        name="salt_2p8b: V 256000, h 2560", rows=256000, hidden_size=2560, teacher_hidden_size=2048, microbatch_tokens=5120
    ),
)


def head_times(shape: HeadShape, chunk_tokens: int, logit: LogitBytes, rates: Rates) -> HeadTimes:
    """The least time of the head's parts by arithmetic and memory traffic. bfloat16 weights."""
    rows, hidden, chunk = shape.rows, shape.hidden_size, min(chunk_tokens, shape.microbatch_tokens)

    def product(width: int, weight_bytes: float, logit_bytes: float) -> float:
        """A product with a weight [rows, width], of which each chunk moves `weight_bytes` a number."""
        moved = weight_bytes * rows * width / chunk + logit_bytes * rows
        return 1e6 * rates.product(2 * rows * width, moved)

    return HeadTimes(
        forward=product(hidden, 2, logit.student),
        hidden_gradient=product(hidden, 2, logit.student),
        weight_gradient=product(hidden, 8, logit.student),
        teacher=product(shape.teacher_hidden_size, 2, logit.teacher) if logit.teacher else 0.0,
        passes=1e6 * logit.passes * rows / rates.bytes,
        main_grad=1e6 * (4 + 4 + 8) * rows * hidden / shape.microbatch_tokens / rates.bytes,
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--operations", action="store_true", help="print the bytes of each operation")
    asked.add_argument("--card", choices=CARDS, default="NVIDIA H100 80GB HBM3", metavar="NAME", help="default: %(default)s")
    asked.add_argument("--tflops", type=above_zero, help="10^12 FLOP/s that products reach, instead of the card's")
    asked.add_argument("--gb-per-s", type=above_zero, help="10^9 bytes/s that are reached, instead of the card's")
    asked.add_argument("--chunks", nargs="+", type=whole, help="tokens of a chunk; default: those of a CPU and of a GPU")
    flags = asked.parse_args()
    card = reached(CARDS[flags.card].bf16_tflops, CARDS[flags.card].gb_per_s)
    rates = Rates(
        card.flops if flags.tflops is None else flags.tflops * 1e12,
        card.bytes if flags.gb_per_s is None else flags.gb_per_s * 1e9,
    )
    counts = {path: counted(path) for path in PATHS}
    print_counts(counts, flags.operations)
    print_times(counts, flags.chunks, rates)
    print_results(counts["kernels"])


def counted(path: str) -> Counts:
    """The counts of one path, from a process of its own: Triton reads TRITON_INTERPRET as a kernel is defined."""
    environment = os.environ | {"TRITON_INTERPRET": PATHS[path], "PYTHONWARNINGS": "ignore"}
    program = str(ROOT / "benchmarks/head_bytes.py")
    done = subprocess.run([sys.executable, program], env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def total(counts: Counts, form: str, part: str) -> float:
    """Bytes a logit of all operations of a part."""
    return sum(counts[form][part].values())


def print_counts(counts: Mapping[str, Counts], operations: bool) -> None:
    """A table: a row for each form of the head, the passes of each path and the products."""
    print(f"bytes a logit, counted\n{'':14}" + "".join(f"{path + ', passes':>18}" for path in counts) + f"{'products':>12}")
    for form in counts["kernels"]:
        cells = "".join(f"{total(of_path, form, SUMS):18.2f}" for of_path in counts.values())
        print(f"{form:22}{cells}{total(counts['kernels'], form, PRODUCTS):12.2f}")
        for path, of_path in counts.items() if operations else ():
            print(f"    {path}: " + ", ".join(f"{name} {moved:.2f}" for name, moved in of_path[form][SUMS].items()))


def logit_bytes(counts: Counts, form: str) -> LogitBytes:
    """What the estimate needs of the counts. The three products of the plain form each move the student's logits once."""
    plain = total(counts, "plain", PRODUCTS)
    return LogitBytes(
        passes=total(counts, form, SUMS), student=plain / 3, teacher=total(counts, form, PRODUCTS) - plain
    )  # fmt: skip


def print_times(counts: Mapping[str, Counts], chunks: list[int] | None, rates: Rates) -> None:
    """A table of estimates: a row for each shape, chunk, path and form."""
    names = [part.name.replace("_", " ") for part in fields(HeadTimes)]
    print(f"\nESTIMATE, not measured: us a token at {rates.flops / 1e12:g} TFLOP/s and {rates.bytes / 1e9:g} GB/s\n"
          f"{'':30}{'chunk':>6}  " + "".join(f"{name:>17}" for name in names) + f"{'total':>8}")  # fmt: skip
    for shape in SHAPES:
        print(shape.name)
        for chunk in chunks or [tokens_within(CPU_MIB, shape.rows * (2 + 4)), gpu_tokens(2)]:
            for path, of_path in counts.items():
                for form in ("kd, T 0.25", "plain"):
                    times = head_times(shape, chunk, logit_bytes(of_path, form), rates)
                    cells = "".join(f"{getattr(times, part.name):17.2f}" for part in fields(HeadTimes))
                    tokens = min(chunk, shape.microbatch_tokens)
                    print(f"    {path + ', ' + form:26}{tokens:6}  {cells}{times.total:8.2f}")


def print_results(counts: Counts) -> None:
    """The RESULT lines of the kernels."""
    for form, goal in GOALS.items():
        name = form.replace(", ", "_").replace(" ", "")
        result(f"kernels_bytes_a_logit_{name}", total(counts, form, SUMS), goal, lower_is_better=True)


if __name__ == "__main__":
    main()
