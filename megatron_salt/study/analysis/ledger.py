"""What each run of a study cost: FLOPs and seconds by phase, under three accounts of its teacher. Pure.

FLOPs of the run come from its own log (`student_flops`, `teacher_flops`), which counts matrix products as Megatron-LM does; the split into
layers and output heads follows model/flops.py. Evaluations are in no account. Seconds are those of training steps on the run's own ranks;
evaluations and saves are told beside them. What was done before the run (a `Preparation`) is added by the kind of its arm. A run that
reads a teacher's cache is charged with what it computed; what the cache spared it is told beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from megatron_salt.config import ModelConfig, RunConfig
from megatron_salt.metrics.history import CacheUse, Curve
from megatron_salt.model.flops import head_flops, layer_flops
from megatron_salt.study.results import Kind, RunResult, RunState

Account = Literal["existed", "trained", "shared"]
ACCOUNTS: tuple[Account, ...] = get_args(Account)
ACCOUNT_WORDS: dict[Account, str] = {
    "existed": "teacher existed", "trained": "teacher trained for this run", "shared": "teacher shared by several runs",
}  # fmt: skip

Payer = Literal["flops", "seconds"]
"""What things are paid with."""

RunPhase = Literal["student layers", "student head", "teacher layers", "teacher head", "teacher"]
"""FLOPs that a run computes. "teacher": layers and head together, where the teacher's shape is not known."""
Before = Literal["teacher training", "scoring", "selection", "grow source"]
"""What is done before a run."""
BEFORE: tuple[Before, ...] = get_args(Before)

USED: dict[Kind, tuple[Before, ...]] = {
    "baseline": (),
    "longer": (),
    "salt": ("teacher training",),
    "rkd": ("teacher training",),
    "let": ("teacher training",),
    "salt_let": ("teacher training",),
    "random": ("teacher training",),
    "gated": ("teacher training",),
    "salt_ds": ("teacher training", "scoring", "selection"),
    "ds_only": ("teacher training", "scoring", "selection"),
    "grow": ("grow source",),
}
"""What an arm's runs need. DS_ONLY learns from no teacher, but one gave the scores. RANDOM's windows need no scores."""


@dataclass(frozen=True)
class Spent:
    """FLOPs and wall-clock seconds of one thing. None: not known."""

    flops: float | None
    seconds: float | None


UNKNOWN = Spent(None, None)
NOTHING = Spent(0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a study did before a run, or found done. A kind of arm is charged with what it uses (`USED`)."""

    teacher: ModelConfig | None = None
    """Shape of the teacher; None: no teacher, or unknown, and then layers and head of the teacher stay one phase"""
    teacher_training: Spent = UNKNOWN
    """Of a teacher that existed, one or both figures may not be known"""
    scoring: Spent = NOTHING
    """The teacher's forward pass over the windows that have scores"""
    selection: Spent = NOTHING
    """`tools/select_data.py`; it multiplies no matrices"""
    grow_source: Spent = NOTHING
    """Training of the shallower model that a GROW run begins with"""
    runs_that_share: int = 1
    """Runs that share the teacher, its scores and the selection"""

    def __post_init__(self) -> None:
        if self.runs_that_share < 1:
            raise ValueError(f"runs_that_share must be at least 1, got {self.runs_that_share}")


PreparationOf = Callable[[RunResult], Preparation]
"""The preparation of a run; the same for all runs of a study with one teacher and one selection."""


def before(kind: Kind, preparation: Preparation, account: Account) -> dict[Before, Spent]:
    """What a run of this kind is charged with, beside itself.

    existed: no training of the teacher. trained: all of it. shared: an equal part of it, of the scores and of the selection.
    A GROW run's source is its own under every account.
    """
    share = preparation.runs_that_share if account == "shared" else 1
    charged: dict[Before, Spent] = {}
    for part in USED[kind]:
        spent = {"teacher training": preparation.teacher_training, "scoring": preparation.scoring,
                 "selection": preparation.selection, "grow source": preparation.grow_source}[part]  # fmt: skip
        if part == "teacher training" and account == "existed":
            spent = NOTHING
        if part != "grow source":
            spent = Spent(*(None if value is None else value / share for value in (spent.flops, spent.seconds)))
        charged[part] = spent
    return charged


def total_before(kind: Kind, preparation: Preparation, account: Account, unit: Payer) -> float | None:
    """Sum of what a run of this kind is charged with, beside itself; None where a part is not known."""
    charged = before(kind, preparation, account).values()
    values = [spent.flops if unit == "flops" else spent.seconds for spent in charged]
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What one run cost up to the last step of its log. A failed run has its cost too."""

    label: str
    """Arm and settings"""
    kind: Kind
    seed: int
    state: RunState
    flops: Mapping[RunPhase, float] | None
    """None: no log, or one that does not tell FLOPs"""
    seconds: Mapping[str, float] | None
    """Of training steps: {"data", "teacher", "forward-backward", "optimizer", "other"}. None: no log, or one of a part of the run"""
    beside: Mapping[str, float]
    """Seconds of evaluations ("eval", tasks included) and of saves ("save") in the log; in no account. The last save is not in the log."""
    spared: float
    """FLOPs of the teacher's layers that were not computed, because a cache had what they would give; in no account"""
    cache: CacheUse | None
    """None: the run had no --teacher-cache, or its log does not tell"""
    preparation: Preparation

    def total(self, unit: Payer, account: Account) -> float | None:
        """FLOPs, or seconds of training steps, of the run and of what went before; None where one is not known."""
        own, charged = (
            (self.flops if unit == "flops" else self.seconds),
            total_before(self.kind, self.preparation, account, unit),
        )
        return None if own is None or charged is None else math.fsum([*own.values(), charged])


def cost_of(result: RunResult, preparation: Preparation) -> RunCost:
    """The cost of a run, from its log and its own record of its flags."""
    curve = result.curve
    flops = None if curve is None else _run_flops(curve, result.config, preparation.teacher)
    return RunCost(
        label=result.label,
        kind=result.kind,
        seed=result.seed,
        state=result.state,
        flops=flops,
        seconds=_run_seconds(curve) if curve is not None and curve.is_whole else None,
        beside={} if curve is None else {"eval": _evaluation_seconds(curve), "save": curve.phases.get("save", 0.0)},
        spared=0.0 if curve is None or flops is None else _spared(curve, result.config, preparation.teacher, flops),
        cache=None if curve is None else curve.teacher_cache,
        preparation=preparation,
    )


def costs_of(results: Sequence[RunResult], preparation_of: PreparationOf) -> list[RunCost]:
    """`cost_of` every run, in the order of `results`."""
    return [cost_of(result, preparation_of(result)) for result in results]


def _run_flops(curve: Curve, config: RunConfig | None, teacher: ModelConfig | None) -> dict[RunPhase, float] | None:
    """FLOPs of a run by phase. Without the run's own flags all of the student stands under "student layers"."""
    if curve.flops is None:
        return None
    of_student = float(curve.of_steps["train/student_flops"][-1])
    of_teacher = float(curve.of_steps["train/teacher_flops"][-1])
    if config is None:
        return {"student layers": of_student, "teacher": of_teacher}
    length = config.training.seq_length
    tokens = float(curve.of_steps["train/consumed_samples"][-1]) * length
    layers = 3.0 * config.model.num_layers * layer_flops(config.model, length) * tokens
    found: dict[RunPhase, float] = {"student layers": layers, "student head": of_student - layers}
    rows = output_rows(curve, config)
    if teacher is None or rows is None:
        return found | {"teacher": of_teacher}
    _, with_head = _taught_tokens(curve, config, teacher, rows)
    head = min(with_head * head_flops(teacher, rows), of_teacher)
    return found | {"teacher layers": of_teacher - head, "teacher head": head}


def output_rows(curve: Curve, config: RunConfig) -> int | None:
    """Rows of the student's output weight, from the FLOPs in its log; a teacher's has as many. None: the log does not tell FLOPs."""
    if curve.flops is None:
        return None
    length = config.training.seq_length
    tokens = float(curve.of_steps["train/consumed_samples"][-1]) * length
    layers = 3.0 * config.model.num_layers * layer_flops(config.model, length)
    return round((float(curve.of_steps["train/student_flops"][-1]) / tokens - layers) / (3.0 * head_flops(config.model, 1)))


def _taught_tokens(curve: Curve, config: RunConfig, teacher: ModelConfig, rows: int) -> tuple[float, float]:
    """Tokens that the teacher's layers would see without a cache, and tokens that its head saw.

    Without guidance both are those of the steps in which `teacher_flops` grew, and of steps before the log began by its FLOPs. With
    guidance the log has the weight of what is taught in a step, and the flags tell the steps before it.
    """
    length = config.training.seq_length
    flops, tokens = curve.of_steps["train/teacher_flops"], np.diff(curve.tokens, prepend=0).astype(np.float64)
    if not config.salt.guides_hidden:
        if not curve.is_whole:
            tokens[0] = flops[0] / (teacher.num_layers * layer_flops(teacher, length) + head_flops(teacher, rows))
        grew = float(tokens[np.diff(flops, prepend=0.0) > 0].sum())
        return grew, grew
    nothing = np.full(len(tokens), np.nan)
    soft, hidden = (~np.isnan(curve.of_steps.get(f"train/{name}", nothing)) for name in ("kd_weight", "let_weight"))
    before, salt = int(curve.steps[0]) - 1, config.salt
    of_step = float(config.training.global_batch_size or 0) * length
    unseen = [of_step * min(before, steps or 0) for steps in (salt.stage1_steps, salt.kd_steps)]
    return float(tokens[soft | hidden].sum()) + unseen[0], float(tokens[soft].sum()) + unseen[1]


def _spared(curve: Curve, config: RunConfig | None, teacher: ModelConfig | None, flops: Mapping[RunPhase, float]) -> float:
    """See `RunCost.spared`; 0 for a run without a cache."""
    if "train/teacher_cached" not in curve.of_steps or config is None or teacher is None or "teacher layers" not in flops:
        return 0.0
    length, rows = config.training.seq_length, output_rows(curve, config)
    assert rows is not None
    with_layers, _ = _taught_tokens(curve, config, teacher, rows)
    live = with_layers * teacher.num_layers * layer_flops(teacher, length)
    return max(0.0, live - flops["teacher layers"])


_TRAINING = ("data", "teacher", "forward-backward", "optimizer")


def _run_seconds(curve: Curve) -> dict[str, float]:
    """Seconds of all training steps by phase; their sum is that of the step times."""
    seconds = {phase: curve.phases[phase] for phase in _TRAINING if phase in curve.phases}
    return seconds | {"other": float(curve.seconds[-1]) - math.fsum(seconds.values())}


def _evaluation_seconds(curve: Curve) -> float:
    return math.fsum(
        value for name, values in curve.of_evaluations.items() if name.endswith("/seconds") for value in values.values()
    )


# --- tables -----------------------------------------------------------------------------------------------------------

FLOP_HEADS = (
    "run", "seed", "state", "student layers", "student head", "teacher layers", "teacher head", "teacher training", "scoring",
    "grow source", *(f"FLOPs, {words}" for words in ACCOUNT_WORDS.values()),
)  # fmt: skip
SECOND_HEADS = (
    "run", "seed", "state", *_TRAINING, "other", "teacher training", "scoring", "selection", "grow source",
    *(f"seconds, {words}" for words in ACCOUNT_WORDS.values()), "evaluations beside", "saves beside",
)  # fmt: skip
CACHE_HEADS = (
    "run", "seed", "state", "FLOPs not computed", "MiB read", "seconds reading", "MiB written", "seconds writing",
)  # fmt: skip
ACCOUNT_HEADS = (
    "arm", "finished", *(f"{unit}, {words}" for words in ACCOUNT_WORDS.values() for unit in ("FLOPs", "seconds")),
)  # fmt: skip


def number(value: float | None, digits: int = 4) -> str:
    """A number of a table; "-": not known."""
    return "-" if value is None else f"{value:.{digits}g}"


def flop_rows(costs: Sequence[RunCost]) -> list[list[str]]:
    """Rows of FLOP_HEADS. What went before stands whole, totals have the shares. A teacher of unknown shape: all in its layers."""

    def row(cost: RunCost) -> list[str]:
        flops, done = cost.flops or {}, before(cost.kind, cost.preparation, "trained")
        cells = [flops.get("student layers"), flops.get("student head"), flops.get("teacher layers", flops.get("teacher")),
                 flops.get("teacher head")]  # fmt: skip
        cells += [done.get(part, NOTHING).flops for part in ("teacher training", "scoring", "grow source")]
        return [*_names(cost), *map(number, cells), *(number(cost.total("flops", account)) for account in ACCOUNTS)]

    return [row(cost) for cost in costs]


def second_rows(costs: Sequence[RunCost]) -> list[list[str]]:
    """Rows of SECOND_HEADS."""

    def row(cost: RunCost) -> list[str]:
        seconds, done = cost.seconds or {}, before(cost.kind, cost.preparation, "trained")
        cells = [seconds.get(phase) for phase in (*_TRAINING, "other")] + [done.get(part, NOTHING).seconds for part in BEFORE]
        totals = [cost.total("seconds", account) for account in ACCOUNTS]
        return [*_names(cost), *map(number, [*cells, *totals, cost.beside.get("eval"), cost.beside.get("save")])]

    return [row(cost) for cost in costs]


def cache_rows(costs: Sequence[RunCost]) -> list[list[str]]:
    """Rows of CACHE_HEADS, of the runs with a teacher's cache alone. Seconds are those of threads beside the training."""
    rows = []
    for cost in costs:
        use = cost.cache
        if use is not None:
            cells = [use.bytes_read / 2**20, use.seconds_reading, use.bytes_written / 2**20, use.seconds_writing]
            rows.append([*_names(cost), number(cost.spared), *map(number, cells)])
        elif cost.spared:
            rows.append([*_names(cost), number(cost.spared), *"----"])
    return rows


def account_rows(costs: Sequence[RunCost]) -> list[list[str]]:
    """Rows of ACCOUNT_HEADS: for each arm the means over its finished runs, and how many of all runs they are."""
    by_label: dict[str, list[RunCost]] = {}
    for cost in costs:
        by_label.setdefault(cost.label, []).append(cost)
    rows = []
    for label, runs in by_label.items():
        done = [run for run in runs if run.state == "finished"]
        means = [_mean([run.total(unit, account) for run in done]) for account in ACCOUNTS for unit in get_args(Payer)]
        rows.append([label, f"{len(done)} of {len(runs)}", *map(number, means)])
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if values and len(known) == len(values) else None


def _names(cost: RunCost) -> list[str]:
    return [cost.label, str(cost.seed), cost.state]
