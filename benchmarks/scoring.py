"""The cost of scoring beside the teacher's forward pass: tokens/s of the inner part of `tools/score_data.py` on one CPU rank.

    python benchmarks/scoring.py           two minutes; one core

The rival is only the forward pass of the same teacher over the same windows: reading, body, and the product with the output weight,
chunk by chunk into a buffer. Scoring also computes loss, rank and entropy of each token and the columns of each window, and hashes
the window's contents. Both take turns on the same samples. The ratio is the median over neighbouring pairs. With --vocabulary 32768
the head costs as much as the body.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import stage1_overhead
import torch
from results import result, whole
from torch import Tensor, nn

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from megatron_salt.config import DataConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.data.samples import open_training_data
from megatron_salt.model.gpt import GPT
from megatron_salt.model.kernels.passes import slices
from megatron_salt.parallel.launch import distributed
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.pipeline import LossFunction, run_pipeline
from megatron_salt.salt.scorer import Scorer, make_scorer, teacher_flags
from megatron_salt.salt.teacher_checkpoint import read_teacher

SHAPE = stage1_overhead.SHAPES["middle"]
GOAL = 0.90
WINDOWS, MICRO_BATCH = 16, 4


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pairs", type=whole, default=9)
    asked.add_argument("--vocabulary", type=whole, default=SHAPE.vocabulary)
    asked.add_argument("--bf16", action="store_true")
    flags = asked.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage1_overhead.teach_for_one_step(folder, replace(SHAPE, vocabulary=flags.vocabulary), flags.bf16)
        pairs = measure(folder, flags.vocabulary, flags.pairs)
    tokens = WINDOWS * stage1_overhead.SEQ_LENGTH
    for what, seconds in (("scoring", [pair[0] for pair in pairs]), ("bare forward pass", [pair[1] for pair in pairs])):
        print(f"{what:20}{tokens / statistics.median(seconds):>10.0f} tokens/s (CPU seconds)")
    low, middle, high = statistics.quantiles([bare / scoring for scoring, bare in pairs], n=4)
    print(f"quartiles {low:.3f}-{high:.3f}, {len(pairs)} pairs, vocabulary {flags.vocabulary}")
    result(f"scoring_over_bare_forward_{flags.vocabulary // 1024}K{'_bf16' if flags.bf16 else ''}", middle, GOAL)


def measure(folder: Path, vocabulary: int, pairs: int) -> list[tuple[float, float]]:
    """CPU seconds of scoring and of the forward pass, in turns."""
    data = DataConfig(data_path=(str(folder / "data"),))
    samples, _ = open_training_data(data, stage1_overhead.SEQ_LENGTH, 0, vocabulary, None)
    teacher, timeout = read_teacher(str(folder / "teacher")), timedelta(minutes=5)
    with distributed(timeout):
        scorer = make_scorer(
            teacher,
            Layout(),
            samples,
            flags=teacher_flags(Layout(), 0.01),
            shared_ids=vocabulary,
            dtype=teacher.dtype,
            micro_batch_size=MICRO_BATCH,
            top_k=(1, 10, 50, 100),
            chunk_mib=256,
            timeout=timeout,
        )
        found = []
        for pair in range(pairs + 1):
            scoring, bare = (lambda: scorer.score(np.arange(WINDOWS))), (lambda: bare_forward(scorer))
            seconds = [cpu_seconds(action) for action in ((scoring, bare) if pair % 2 else (bare, scoring))]
            found.append((seconds[0], seconds[1]) if pair % 2 else (seconds[1], seconds[0]))
        return found[1:]


def cpu_seconds(action) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


@torch.no_grad()
def bare_forward(scorer: Scorer) -> None:
    """Read, run the body, and compute the logits of every token."""
    tokens = scorer._tokens
    assert tokens is not None

    def step(body: nn.Module, batch: Microbatch) -> tuple[Tensor, LossFunction]:
        assert isinstance(body, GPT)
        hidden = body(*body.inputs(batch))

        def logits(hidden_sbh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden_nh = hidden_sbh.flatten(0, 1)
            for chunk in slices(len(hidden_nh), tokens._chunk_tokens):
                tokens.logits(hidden_nh[chunk])
            none = torch.zeros(())
            return none, none.int(), none

        return hidden, logits

    batches = [scorer._microbatch(np.arange(start, start + MICRO_BATCH)) for start in range(0, WINDOWS, MICRO_BATCH)]
    run_pipeline([scorer._body], step, batches, scorer._mesh, scorer.seq_length, MICRO_BATCH, forward_only=True)


if __name__ == "__main__":
    main()
