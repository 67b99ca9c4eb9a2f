"""The ledger against hand arithmetic in whole numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.config import SaltConfig
from megatron_salt.errors import UserError
from megatron_salt.metrics.history import CacheUse, read_curve
from megatron_salt.study.analysis.ledger import (
    ACCOUNT_HEADS,
    ACCOUNTS,
    CACHE_HEADS,
    FLOP_HEADS,
    SECOND_HEADS,
    UNKNOWN,
    Preparation,
    Spent,
    account_rows,
    before,
    cache_rows,
    cost_of,
    costs_of,
    flop_rows,
    output_rows,
    second_rows,
)
from megatron_salt.study.results import Kind
from tests.metrics.logs import open_log, record
from tests.study.analysis.runs import ROWS, STUDENT_STEP, TEACHER, TEACHER_STEP, falling, run

CURVE = falling(5.0, 4.0)
PREPARATION = Preparation(
    teacher=TEACHER, teacher_training=Spent(60_000, 12.0), scoring=Spent(3_000, 6.0), selection=Spent(0, 3.0),
    grow_source=Spent(40_000, 8.0), runs_that_share=3,
)  # fmt: skip


def test_phases_of_a_run_are_those_of_hand_arithmetic() -> None:
    """10 steps of 18 tokens, the teacher in the first 4. Student: 304 and 80 FLOPs a token, three times. Teacher: 88 and 40."""
    cost = cost_of(run("salt", 1, CURVE, teacher_steps=4), PREPARATION)
    assert cost.flops == {
        "student layers": 3 * 304 * 180, "student head": 3 * 80 * 180, "teacher layers": 88 * 72, "teacher head": 40 * 72,
    }  # fmt: skip
    assert sum(cost.flops.values()) == 10 * STUDENT_STEP + 4 * TEACHER_STEP == 216_576
    assert cost.seconds == {"data": 2.5, "forward-backward": 10.0, "other": 7.5} and cost.beside == {"eval": 0.0, "save": 5.0}


def test_three_accounts_differ_in_what_went_before_the_run() -> None:
    """Shared by 3: a third of the teacher's 60,000 FLOPs and 12 seconds, of the scores' 3,000 and 6, of the selection's 3 seconds."""
    of_run = 10 * STUDENT_STEP + 4 * TEACHER_STEP
    salt = cost_of(run("salt", 1, CURVE, teacher_steps=4), PREPARATION)
    assert [salt.total("flops", account) for account in ACCOUNTS] == [of_run, of_run + 60_000, of_run + 20_000]
    assert [salt.total("seconds", account) for account in ACCOUNTS] == [20, 32, 24]
    salt_ds = cost_of(run("salt_ds", 1, CURVE, teacher_steps=4), PREPARATION)
    assert [salt_ds.total("flops", account) for account in ACCOUNTS] == [of_run + 3_000, of_run + 63_000, of_run + 21_000]
    assert [salt_ds.total("seconds", account) for account in ACCOUNTS] == [20 + 9, 20 + 21, 20 + 7]
    for account in ACCOUNTS:
        assert salt_ds.flops is not None
        parts = [*salt_ds.flops.values(), *(spent.flops or 0 for spent in before("salt_ds", PREPARATION, account).values())]
        assert salt_ds.total("flops", account) == sum(parts)


@pytest.mark.parametrize(
    "kind, existed, trained, shared",
    [
        ("baseline", 0, 0, 0), ("longer", 0, 0, 0), ("rkd", 0, 60_000, 20_000), ("random", 0, 60_000, 20_000),
        ("ds_only", 3_000, 63_000, 21_000), ("grow", 40_000, 40_000, 40_000),
    ],
)  # fmt: skip
def test_a_kind_of_arm_pays_for_what_it_uses(kind: Kind, existed: int, trained: int, shared: int) -> None:
    cost = cost_of(run(kind, 1, CURVE), PREPARATION)
    assert [cost.total("flops", account) for account in ACCOUNTS] == [
        10 * STUDENT_STEP + paid for paid in (existed, trained, shared)
    ]


def test_of_a_teacher_that_existed_its_training_may_not_be_known() -> None:
    existed = replace(PREPARATION, teacher_training=Spent(60_000, None))
    salt, baseline = costs_of([run("salt", 1, CURVE, teacher_steps=4), run("baseline", 1, CURVE)], lambda _: existed)
    assert [salt.total("flops", account) for account in ACCOUNTS] == [216_576, 276_576, 236_576]
    assert [salt.total("seconds", account) for account in ACCOUNTS] == [20, None, None]
    (salt,) = costs_of([run("salt", 1, CURVE, teacher_steps=4)], lambda _: replace(PREPARATION, teacher_training=UNKNOWN))
    assert [baseline.total("seconds", account) for account in ACCOUNTS] == [20, 20, 20]
    assert flop_rows([salt])[0][FLOP_HEADS.index("teacher training") :] == ["-", "0", "0", "2.166e+05", "-", "-"]


def test_what_is_not_known_is_told_as_such() -> None:
    """A teacher of unknown shape, flags that were not read, an old log, a log of a part, no log."""
    unknown = Preparation(teacher_training=Spent(60_000, 12.0))
    salt = run("salt", 1, CURVE, teacher_steps=4)
    assert cost_of(salt, unknown).flops == {
        "student layers": 164_160, "student head": 43_200, "teacher": 4 * TEACHER_STEP,
    }  # fmt: skip
    assert cost_of(replace(salt, config=None), PREPARATION).flops == {"student layers": 207_360, "teacher": 9_216}
    assert cost_of(run("salt", 1, CURVE, flops=False), PREPARATION).flops is None
    part = cost_of(run("salt", 1, CURVE, teacher_steps=4, first=3), PREPARATION)
    assert part.flops == cost_of(salt, PREPARATION).flops and part.seconds is None and part.total("seconds", "existed") is None
    none = cost_of(run("salt", 1, CURVE, logged=False, state="waiting"), PREPARATION)
    assert none.flops is None and none.seconds is None and none.total("flops", "trained") is None
    assert set(flop_rows([none])[0][3:7]) == {"-"}


def test_a_cached_teacher_costs_its_head_and_what_the_cache_lacked(tmp_path: Path) -> None:
    """`teacher_flops` has the head's 40 FLOPs for all 72 tokens of stage 1, and the layers' 88 for a half of them."""
    whole = run("salt", 1, CURVE, teacher_steps=4)
    assert whole.curve is not None
    half = {"train/teacher_flops": whole.curve.of_steps["train/teacher_flops"] * (40 + 44) / 128}
    cached = half | {"train/teacher_cached": np.full(10, 0.5)}
    use = CacheUse(3 << 20, 1 << 20, 0.5, 0.25)
    cost = cost_of(
        replace(whole, curve=replace(whole.curve, of_steps=whole.curve.of_steps | cached, teacher_cache=use)), PREPARATION
    )
    assert cost.flops is not None and cost.flops["teacher layers"] == 44 * 72 and cost.flops["teacher head"] == 40 * 72
    assert cost.spared == 44 * 72 and cost.total("flops", "existed") == 10 * STUDENT_STEP + 84 * 72
    plain = cost_of(whole, PREPARATION)
    assert plain.spared == 0 and plain.cache is None
    assert cache_rows([plain, cost]) == [["salt", "1", "finished", "3168", "3", "0.5", "1", "0.25"]]
    assert len(CACHE_HEADS) == 8


def test_a_guided_run_pays_for_the_teachers_head_only_while_it_gives_soft_labels() -> None:
    """Four steps with the teacher, 18 tokens each: layers of 88 FLOPs in all of them, head of 40 in the first two. The log is whole, or it
    begins at step 4, or a cache had the hidden states."""
    whole = run("salt_let", 1, CURVE, teacher_steps=4)
    assert whole.curve is not None and whole.config is not None
    salt = SaltConfig(teacher_load="t", guide="both", kd_steps=2, let_steps=4)
    config, nan = replace(whole.config, salt=salt), np.nan
    of_steps = whole.curve.of_steps | {
        "train/teacher_flops": np.array([128, 256, 344, 432, *[432] * 6]) * 18.0,
        "train/kd_weight": np.array([0.5, 0.5, *[nan] * 8]), "train/let_weight": np.array([0.1] * 4 + [nan] * 6),
    }  # fmt: skip
    cost = cost_of(replace(whole, config=config, curve=replace(whole.curve, of_steps=of_steps)), PREPARATION)
    assert cost.flops is not None and cost.spared == 0
    assert cost.flops["teacher layers"] == 4 * 88 * 18 and cost.flops["teacher head"] == 2 * 40 * 18

    part = run("salt_let", 1, CURVE, teacher_steps=4, first=4)
    assert part.curve is not None
    of_part = part.curve.of_steps | {name: values[3:] for name, values in of_steps.items() if name not in part.curve.of_steps}
    of_part["train/teacher_flops"] = of_steps["train/teacher_flops"][3:]
    assert cost_of(replace(part, config=config, curve=replace(part.curve, of_steps=of_part)), PREPARATION).flops == cost.flops

    cached = of_steps | {
        "train/teacher_flops": np.array([40, 80, *[80] * 8]) * 18.0, "train/teacher_cached": np.array([1.0] * 4 + [nan] * 6),
    }  # fmt: skip
    free = cost_of(replace(whole, config=config, curve=replace(whole.curve, of_steps=cached)), PREPARATION)
    assert free.flops is not None and free.flops["teacher layers"] == 0 and free.flops["teacher head"] == 2 * 40 * 18
    assert free.spared == 4 * 88 * 18


def test_the_use_of_a_cache_is_summed_over_the_starts_of_a_run(tmp_path: Path) -> None:
    facts = {"bytes_read": 7, "bytes_written": 2, "seconds_reading": 0.5, "seconds_writing": 0.125, "steps": 2}
    with open_log(tmp_path) as log:
        log.step(record(1))
        log.event(1, "leaving", {"teacher_cache": facts})
        log.event(1, "teacher cache", {"teacher_cache": facts | {"bytes_read": 1}})
    assert read_curve("salt", tmp_path / "log.jsonl").teacher_cache == CacheUse(8, 4, 1.0, 0.25)
    log_file = tmp_path / "log.jsonl"
    log_file.write_text(log_file.read_text().replace("bytes_written", "bytes"))
    with pytest.raises(UserError, match="an entry lacks or garbles 'bytes_written'"):
        read_curve("salt", log_file)


def test_rows_of_the_output_weight_follow_from_the_log() -> None:
    one = run("baseline", 1, CURVE)
    assert one.curve is not None and one.config is not None and output_rows(one.curve, one.config) == ROWS


def test_tables_have_a_cell_for_each_head_and_failed_runs_a_row() -> None:
    results = [
        run("baseline", 1, CURVE), run("salt", 1, CURVE, teacher_steps=4), run("salt", 2, CURVE, steps=6, state="failed"),
    ]  # fmt: skip
    costs = costs_of(results, lambda _: PREPARATION)
    assert [len(row) for row in flop_rows(costs)] == [len(FLOP_HEADS)] * 3
    assert [len(row) for row in second_rows(costs)] == [len(SECOND_HEADS)] * 3
    assert flop_rows(costs)[1] == [
        "salt", "1", "finished", "1.642e+05", "4.32e+04", "6336", "2880", "6e+04", "0", "0", "2.166e+05", "2.766e+05", "2.366e+05",
    ]  # fmt: skip
    assert second_rows(costs)[2][:3] == ["salt", "2", "failed"]
    assert account_rows(costs) == [
        ["baseline", "1 of 1", *["2.074e+05", "20"] * 3],
        ["salt", "1 of 2", "2.166e+05", "20", "2.766e+05", "32", "2.366e+05", "24"],
    ]
    assert len(ACCOUNT_HEADS) == 8


def test_a_preparation_that_nobody_shares_is_refused() -> None:
    with pytest.raises(ValueError, match="runs_that_share must be at least 1, got 0"):
        Preparation(runs_that_share=0)


def test_seconds_come_from_the_phases_in_the_log_and_evaluations_stand_beside(tmp_path: Path) -> None:
    """Two steps of half a second. An evaluation takes 1.5 s, a task 0.25 s; step 2 is written again after a resumption and counts once."""
    with open_log(tmp_path) as log:
        for step, data in ((1, 0.125), (2, 9.0), (2, 0.25)):
            log.step(record(step, phases=lambda data=data: {"data": data, "optimizer": 0.0625, "save": 0.75, "eval": 7.0}))
        log.evaluation(2, "valid", 3.0, tokens=10, seconds=1.5)
        log.task(2, "piqa", {"metrics": {}, "examples": 1, "cut": 0, "seconds": 0.25})
    curve = read_curve("salt", tmp_path / "log.jsonl")
    cost = cost_of(replace(run("salt", 1, CURVE), curve=curve), PREPARATION)
    assert cost.seconds == {"data": 0.375, "optimizer": 0.125, "other": 0.5} and cost.total("seconds", "existed") == 1.0
    assert cost.beside == {"eval": 1.75, "save": 1.5}
