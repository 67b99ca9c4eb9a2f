"""Step times by precision, with and without a teacher: torch layers, Transformer Engine, and FP8 with each recipe of the GPU.

    python benchmarks/precision_steps.py                    a student of 0.8B and a teacher of 0.4B parameters on one GPU
    python benchmarks/precision_steps.py --ranks 2 --flags --tensor-model-parallel-size 2 --sequence-parallel
    python benchmarks/precision_steps.py --tiny             a small pair, also without a GPU, to check that it runs

Each row is a run of the program; half of it is stage 1. Times are from its log: the median over each stage without its first steps.
In a row with FP8 the teacher uses FP8 too, with the same recipe (tensorwise in the row of delayed scaling, which a teacher cannot
use). For a precision that this machine does not have, or that the program refuses, the row has the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron_salt.preprocess.indexed_writer import IndexedWriter, token_dtype

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
FAMILY = ["--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
          "--untie-embeddings-and-output-weights"]  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes of student, teacher and steps."""

    student: str
    teacher: str
    vocabulary_size: int
    seq_length: int
    micro_batch_size: int
    microbatches: int


LARGE = Sizes(
    "--num-layers 16 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 --num-query-groups 8",
    "--num-layers 16 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 --num-query-groups 8",
    vocabulary_size=32768, seq_length=4096, micro_batch_size=2, microbatches=4,
)  # fmt: skip
TINY = Sizes(
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4",
    "--num-layers 1 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 2",
    vocabulary_size=512, seq_length=128, micro_batch_size=1, microbatches=2,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The result of a run, or why there is none."""

    name: str
    stage1: float = 0.0
    """Seconds a step."""
    stage2: float = 0.0
    tokens_per_second: float = 0.0
    """In stage 2."""
    teacher_gib: float = 0.0
    """What the switch gave back."""
    kl: float | None = None
    """Of the teacher's gate, where it is in FP8."""
    refused: str = ""


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--ranks", type=int, default=1, help="GPUs, or CPU ranks")
    asked.add_argument("--steps", type=int, default=24, help="of each row, half of them in stage 1")
    asked.add_argument("--tiny", action="store_true", help="a small pair of models")
    asked.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for the student's runs")
    flags = asked.parse_args()
    sizes = TINY if flags.tiny else LARGE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, sizes)
        teacher = f"{sizes.teacher} --train-iters 1 --global-batch-size {sizes.micro_batch_size} --save {folder / 'teacher'}"
        run(folder, 1, teacher.split(), sizes)
        rows = [measure(folder, row, words, sizes, flags.ranks, flags.steps, flags.flags) for row, words in ways().items()]
    print(table(rows))


def ways() -> dict[str, list[str]]:
    """Names of the rows and their flags."""
    found = {"torch, bf16": "--transformer-impl torch", "Transformer Engine, bf16": "--transformer-impl transformer_engine"}
    for recipe in RECIPES:
        student = f"--transformer-impl transformer_engine --fp8-format hybrid --fp8-recipe {recipe}"
        teacher = f"--teacher-fp8-format hybrid --teacher-fp8-recipe {'tensorwise' if recipe == 'delayed' else recipe}"
        found[f"FP8 {recipe}"] = (
            f"{student} {teacher} --teacher-fp8-max-kl 1e9"  # it has learnt nothing: the figure is told, not judged
        )
    return {name: words.split() for name, words in found.items()}


def measure(folder: Path, name: str, words: list[str], sizes: Sizes, ranks: int, steps: int, more: list[str]) -> Row:
    """Measure one row."""
    stage1 = steps // 2
    batch = sizes.micro_batch_size * sizes.microbatches * ranks  # a multiple of any layout's replicas
    student = [*sizes.student.split(), "--train-iters", str(steps), "--global-batch-size", str(batch), "--teacher-load",
               str(folder / "teacher"), "--kd-steps", str(stage1), *words, *more]  # fmt: skip
    print(f"... {name}", file=sys.stderr, flush=True)
    told = folder / f"{name}.jsonl"
    problem = run(folder, ranks, [*student, "--jsonl", str(told)], sizes)
    if problem is not None:
        return Row(name, refused=problem)
    entries = [json.loads(line) for line in told.read_text().splitlines()]
    timed = [entry for entry in entries if entry["kind"] == "step"]
    first, second = timed[stage1 // 3 : stage1], timed[stage1 + stage1 // 3 :]
    [switch] = [entry for entry in entries if entry.get("stage") == 2]
    gates = [entry["teacher_fp8"]["kl"] for entry in entries if "teacher_fp8" in entry]
    return Row(
        name, *(statistics.median(entry["seconds"] for entry in stage) for stage in (first, second)),
        statistics.median(entry["tokens_per_second"] for entry in second),
        switch["memory_gib_before"] - switch["memory_gib_after"], gates[0] if gates else None,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as a table. Ratios are to the first row."""
    lines = [f"{'stage 2, s':>37}{'stage 1, s':>19}{'1 / 2':>15}{'tokens/s':>11}{'teacher GiB':>13}{'its KL':>10}"]
    base = rows[0]
    for row in rows:
        if row.refused:
            lines.append(f"{row.name:26}not here: {row.refused}")
            continue
        ratios = [f"({base_time / time:.2f}x)" if base_time else "" for base_time, time in
                  ((base.stage2, row.stage2), (base.stage1, row.stage1))]  # fmt: skip
        kl = "" if row.kl is None else f"{row.kl:.1e}"
        lines.append(
            f"{row.name:26}{row.stage2:>11.3f}{ratios[0]:>8}{row.stage1:>11.3f}{ratios[1]:>8}{row.stage1 / row.stage2:>7.2f}"
            f"{row.tokens_per_second:>11.0f}{row.teacher_gib:>13.3f}{kl:>10}"
        )
    return "\n".join(lines)


def run(folder: Path, ranks: int, words: list[str], sizes: Sizes) -> str | None:
    """Run the program with these flags. Returns None, or its error line. Any other failure ends the benchmark."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "megatron_salt.pretrain",
        *FAMILY, "--bf16", "--seq-length", str(sizes.seq_length), "--micro-batch-size", str(sizes.micro_batch_size),
        "--data-path", str(folder / "data"), "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", str(folder / "tokenizer.json"), *words,
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if ended.returncode == 0:
        return None
    _, found, message = ended.stderr.partition("error: ")
    if not found:
        raise SystemExit(f"{' '.join(command)} failed:\n{ended.stderr}")
    return message.splitlines()[0]


def write_data(folder: Path, sizes: Sizes) -> None:
    """Write random tokens, and a tokenizer that has them."""
    words = {f"w{number}": number for number in range(sizes.vocabulary_size)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokens = np.random.default_rng(0).integers(0, sizes.vocabulary_size, 256 * sizes.seq_length + 1)
    dtype = token_dtype(sizes.vocabulary_size)
    writer = IndexedWriter(str(folder / "data"), dtype)
    writer.append(tokens.astype(dtype), np.array([len(tokens)], np.int32))
    writer.finish()


if __name__ == "__main__":
    main()
