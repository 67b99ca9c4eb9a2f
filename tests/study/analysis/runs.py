"""Runs of a study with small whole numbers, for the tests of its arithmetic. No file is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_salt.config import ModelConfig, RunConfig, TrainingConfig
from megatron_salt.metrics.history import Curve
from megatron_salt.study.results import Kind, RunResult, RunState

LOSS = "valid/loss"
STUDENT = ModelConfig(num_layers=1, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2)
"""By hand, with windows of 6 tokens: projections 2 (4 2 (2 + 4) + 16) = 128, MLP 2 (2 4 8) = 128, attention 2 2 2 2 6 / 2 = 48, so 304 for
a token; output layer of 10 rows: 2 4 10 = 80."""
TEACHER = ModelConfig(num_layers=1, hidden_size=2, ffn_hidden_size=4, num_attention_heads=1)
"""Projections 2 (2 2 (1 + 2) + 4) = 32, MLP 2 (2 2 4) = 32, attention 2 2 2 1 6 / 2 = 24: 88 a token; output layer: 2 2 10 = 40."""
LENGTH, BATCH, ROWS = 6, 3, 10
TOKENS = LENGTH * BATCH
"""18 in a step, so the student takes 3 (304 + 80) 18 = 20,736 FLOPs and the teacher (88 + 40) 18 = 2,304."""
STUDENT_STEP, TEACHER_STEP = 20_736, 2_304


def run(
    kind: Kind, seed: int, figures: Mapping[str, Mapping[int, float]], *, arm: str | None = None, steps: int = 10,
    teacher_steps: int = 0, seconds: float = 2.0, state: RunState = "finished", reason: str = "",
    settings: Mapping[str, str] | None = None, planned: int | None = None, first: int = 1, logged: bool = True, flops: bool = True,
) -> RunResult:  # fmt: skip
    """A run of `steps` steps of `seconds` each, with a teacher in the first of them. planned: steps that its flags ask for; None: as many.
    first: step with which its log begins. logged, flops: whether it has a log, and one that tells FLOPs."""
    at = np.arange(first, steps + 1)
    taught = np.minimum(at, teacher_steps)
    of_student, of_teacher = at * float(STUDENT_STEP), taught * float(TEACHER_STEP)
    curve = Curve(
        name=kind, steps=at, losses=np.ones(len(at)), tokens=np.cumsum(np.full(len(at), TOKENS)), switch=None, peak_gib=0.0,
        seconds=np.cumsum(np.full(len(at), seconds)), flops=of_student + of_teacher if flops else None, unread_lines=0,
        teacher=None, teacher_cache=None,
        phases={"data": 0.25 * len(at), "forward-backward": 1.0 * len(at), "save": 5.0},
        of_steps={"train/student_flops": of_student, "train/teacher_flops": of_teacher, "train/consumed_samples": at * float(BATCH)},
        of_evaluations={name: dict(values) for name, values in figures.items()},
    )  # fmt: skip
    training = TrainingConfig(seq_length=LENGTH, global_batch_size=BATCH, train_iters=steps if planned is None else planned)
    return RunResult(
        arm=arm or kind, kind=kind, seed=seed, settings=settings or {}, directory=Path(f"runs/{arm or kind}/{seed}"), state=state,
        reason=reason, config=RunConfig(model=STUDENT, training=training), curve=curve if logged else None,
    )  # fmt: skip


def falling(*values: float, every: int = 2) -> dict[str, dict[int, float]]:
    """Held-out losses at steps 0, `every`, 2 `every` ..."""
    return {LOSS: {every * number: value for number, value in enumerate(values)}}
