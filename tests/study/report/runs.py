"""A study of a few runs with made-up logs: what its report must show, failures among them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from megatron_salt.metrics.history import read_curve
from megatron_salt.study.analysis.ledger import Preparation, Spent
from megatron_salt.study.definition.study import Figures, PrimaryQuestion
from megatron_salt.study.report.facts import StudyFacts
from megatron_salt.study.results import Kind, RunResult
from tests.metrics.logs import open_log, record

STEPS, EVERY, STAGE1 = 40, 4, 12

FACTS = StudyFacts(
    name="laptop <b>",
    primary=PrimaryQuestion(arm="salt", against="baseline", figure="valid/docs/loss"),
    figures=Figures(
        in_domain=("valid/docs/loss",),
        out_of_domain=("valid/prose/bits_per_byte", "valid/absent/bits_per_byte"),
        tasks=("task/copy/acc",),
    ),
    preparation_of=lambda run: Preparation(
        teacher_training=Spent(4e12, 2.0), scoring=Spent(1e12, 1.0), selection=Spent(0.0, 0.5), runs_that_share=10
    ),
    definition="arms:\n  salt: {kind: salt}  # </script>\n",
    machine=("a processor, 2 cores, 24 GiB of memory", "torch 1.2.3"),
)


def run_of(
    home: Path,
    arm: str,
    kind: Kind,
    seed: int,
    gain: float,
    *,
    steps: int = STEPS,
    nan_from: int | None = None,
    reason: str = "",
) -> RunResult:
    """A run whose held-out loss is 5 exp(-step / 30) + 1 + the seed's share - gain step / STEPS."""
    directory = home / arm / f"seed_{seed}"
    directory.mkdir(parents=True)
    taught = kind in ("salt", "salt_ds", "random")
    with open_log(directory, total_steps=STEPS) as log:
        for step in range(steps + 1):
            loss = 5 * math.exp(-step / 30) + 1 + 0.05 * seed - gain * step / STEPS
            loss = math.nan if nan_from is not None and step >= nan_from else loss
            if step:
                flops = 1e11 * min(step, STAGE1) if taught else 0.0
                seconds = 0.625 if taught and step <= STAGE1 else 0.5
                log.step(replace(record(step, loss, teacher_flops=flops), seconds=seconds))
            if taught and step == STAGE1:
                log.event(step, "stage 1 ends", {"stage": 2, "memory_gib_before": 1.5, "memory_gib_after": 1.25})
            if step % EVERY == 0:
                accuracy = {"accuracy": 0.5 - loss / 20} | ({"teacher_accuracy": 0.3, "teacher_loss": 4.0} if taught else {})
                log.evaluation(step, "valid/docs", loss, tokens=1000, seconds=0.1, beside=accuracy)
                log.evaluation(step, "valid/prose", loss + 1, tokens=1000, seconds=0.1, beside={"bits_per_byte": loss / 2})
                acc = {"acc": {"value": 0.9 - loss / 10, "stderr": 0.01}}
                log.task(step, "copy", {"metrics": acc, "examples": 9, "cut": 0, "seconds": 0.1})
    curve = read_curve(f"{arm} {seed}", directory / "log.jsonl")
    state = "failed" if reason else "finished"
    return RunResult(
        arm=arm, kind=kind, seed=seed, settings={}, directory=directory, state=state, reason=reason, config=None, curve=curve
    )  # fmt: skip


def study_runs(home: Path) -> list[RunResult]:
    """Baseline and SALT with three seeds, SALT_DS with a failed and a diverged one, RANDOM with two seeds, and a run that waits."""
    gains = {1: 0.5, 2: 0.4, 3: 0.45}
    runs = [run_of(home, "baseline", "baseline", seed, 0.0) for seed in gains]
    runs += [run_of(home, "salt", "salt", seed, gain) for seed, gain in gains.items()]
    runs += [
        run_of(home, "salt_ds", "salt_ds", 1, 0.3),
        run_of(home, "salt_ds", "salt_ds", 2, 0.3, steps=10, reason="out of memory | on <rank> 0"),
        run_of(home, "salt_ds", "salt_ds", 3, 0.3, nan_from=30),
        run_of(home, "random", "random", 1, -0.1),
        run_of(home, "random", "random", 2, 0.1),
    ]
    waiting = replace(runs[-1], seed=3, state="waiting", curve=None, directory=home / "random/seed_3")
    return [*runs, waiting]
