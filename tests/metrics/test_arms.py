"""Arms: means and bands of seeds, and when one arm passes another by steps, FLOPs and seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.errors import UserError
from megatron_salt.evaluation import metrics
from megatron_salt.metrics.arms import Arm, arms_of, finals, more_is_better, passing, passings
from megatron_salt.metrics.figures import lines_of, table
from megatron_salt.metrics.history import read_curve
from megatron_salt.tools.report import require_below
from tests.metrics.logs import write_run

BITS = "valid/prose/bits_per_byte"


def evaluated(*bits: float) -> dict[str, dict[int, dict[str, float]]]:
    """A set whose bits per byte are these at steps 0, 2, 4 ..., with losses and accuracies that go with them."""
    return {
        "valid/prose": {
            2 * n: {"loss": 2 * bit, "accuracy": 0.99 - bit / 10, "bits_per_byte": bit} for n, bit in enumerate(bits)
        }
    }


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Arm, Arm]:
    """plain: two seeds of 8 steps of half a second. salt: one run of 6 steps of a second, a teacher in the first 4."""
    home = tmp_path_factory.mktemp("logs")
    plain = [
        write_run(home / f"plain-{number}", [5.0 + shift] * 8, evaluated(*(bit + shift for bit in (5.0, 4.0, 3.5, 3.25, 3.0))))
        for number, shift in enumerate((-0.25, 0.25))
    ]
    salt = write_run(home / "salt", [4.5] * 6, evaluated(5.5, 3.5, 2.5, 2.0), teacher_steps=4, seconds=1.0)
    one, two = arms_of([("plain", read_curve("plain", path)) for path in plain] + [("salt", read_curve("salt", salt))])
    return one, two


def test_runs_of_one_name_are_one_arm_with_mean_and_band(arms: tuple[Arm, Arm]) -> None:
    plain, salt = arms
    assert [curve.name for curve in plain.curves] == ["plain (1)", "plain (2)"] and [curve.name for curve in salt.curves] == [
        "salt"
    ]
    band = plain.band(BITS)
    assert band.steps.tolist() == [0, 2, 4, 6, 8] and band.mean.tolist() == [5.0, 4.0, 3.5, 3.25, 3.0]
    assert band.low.tolist() == [4.75, 3.75, 3.25, 3.0, 2.75] and band.high.tolist() == [5.25, 4.25, 3.75, 3.5, 3.25]
    assert finals(arms, [BITS]) == [["plain", "2", "3.0000 (2.7500 to 3.2500)"], ["salt", "1", "2.0000"]]
    assert plain.band("train/loss").mean.tolist() == [5.0] * 8


@pytest.mark.parametrize("x, at", [("steps", [0, 2, 4, 6]), ("tokens", [0, 1600, 3200, 4800]), ("seconds", [0, 2, 4, 6]),
                                   ("flops", [0, 2.4e12, 4.8e12, 6.4e12])])  # fmt: skip
def test_an_evaluation_stands_where_the_run_was(arms: tuple[Arm, Arm], x, at) -> None:
    """A step takes 8e11 FLOPs of the student, and 4e11 of the teacher in the first four."""
    (line,) = lines_of(arms[1:], (BITS,), x)
    assert line.at.tolist() == pytest.approx(at) and line.value.tolist() == [5.5, 3.5, 2.5, 2.0]


def test_passing_is_told_in_shares_of_the_others_whole_length(arms: tuple[Arm, Arm]) -> None:
    plain, salt = arms
    found = passing(salt, plain, BITS)
    assert found.shares == pytest.approx({"steps": 4 / 8, "flops": 4.8 / 6.4, "seconds": 4 / 4})
    assert (
        str(found)
        == f"salt passed plain's final {BITS} 3.0000 at 50.0% of plain's steps, 75.0% of its FLOPs, 100.0% of its seconds"
    )
    assert str(passing(plain, salt, BITS)) == f"plain: salt's final {BITS} 2.0000 not reached"
    assert [(one.arm, one.other) for one in passings(arms, BITS)] == [("plain", "salt"), ("salt", "plain")]


def test_of_accuracies_more_is_better(arms: tuple[Arm, Arm]) -> None:
    assert more_is_better("valid/accuracy") and more_is_better("task/x/acc_norm") and not more_is_better("valid/loss")
    found = passing(arms[1], arms[0], "valid/prose/accuracy")
    assert found.shares is not None and found.shares["steps"] == 0.5


@pytest.mark.parametrize("change", [('"student_flops"', '"another"'), ('"teacher_flops": 0.0', '"teacher_flops": null')])
def test_logs_of_an_earlier_release_have_no_flops(tmp_path: Path, arms: tuple[Arm, Arm], change: tuple[str, str]) -> None:
    log = write_run(tmp_path / "old", [5.0] * 4, evaluated(6.0, 2.5, 2.5))
    log.write_text(log.read_text().replace(*change))
    (old,) = arms_of([("old", read_curve("old", log))])
    assert passing(old, arms[0], BITS).shares == pytest.approx({"steps": 2 / 8, "seconds": 1 / 4})
    with pytest.raises(UserError, match="--x flops: the log of old does not tell FLOPs"):
        lines_of([old], (BITS,), "flops")


def test_of_every_figure_of_a_task_it_is_known_which_way_is_better() -> None:
    less = {"perplexity"}
    for name in {name for names in metrics.METRICS.values() for name in names}:
        assert more_is_better(f"task/x/{name}") == (name not in less), name
        assert not more_is_better(f"task/x/{name}_stderr")


def test_figures_of_tasks_are_figures(tmp_path: Path) -> None:
    log = write_run(tmp_path / "run", [4.0] * 2, evaluated(3.0, 2.0))
    with open(log, "a") as file:
        for step, value in ((0, -2.5), (2, -1.5)):
            file.write(json.dumps({"kind": "task", "step": step, "name": "piqa", "logprob_per_byte": value}) + "\n")
    curve = read_curve("run", log)
    assert curve.figure("task/piqa/logprob_per_byte") == {0: -2.5, 2: -1.5} and curve.final == 4.0


def test_an_evaluation_that_is_not_finite_is_the_last_all_the_same(tmp_path: Path, arms: tuple[Arm, Arm]) -> None:
    log = write_run(tmp_path / "lost", [4.0] * 4, evaluated(3.0, 2.0, math.nan))
    (lost,) = arms_of([("lost", read_curve("lost", log))])
    assert finals([lost], [BITS]) == [["lost", "1", "nan"]] and math.isnan(lost.curves[0].final or 0.0)
    assert passing(arms[0], lost, BITS).shares is None and not require_below(lost, arms[0], 100.0)


def test_seconds_of_a_log_that_begins_later_are_not_compared(tmp_path: Path, arms: tuple[Arm, Arm]) -> None:
    """A run that was resumed with another --save."""
    log = write_run(tmp_path / "rest", [4.0] * 6, evaluated(5.5, 3.5, 2.5, 2.0))
    log.write_text("".join(line for line in log.open() if json.loads(line)["step"] > 2))
    (rest,) = arms_of([("rest", read_curve("rest", log))])
    assert passing(rest, arms[0], BITS).shares == pytest.approx({"steps": 4 / 8, "flops": 3.2 / 6.4})
    assert "rest: its log begins with step 3; tokens and seconds count from there" in table(rest.curves, None)


def test_a_figure_that_is_not_there_is_refused_with_those_that_are(arms: tuple[Arm, Arm]) -> None:
    with pytest.raises(
        UserError, match=r"--y valid/pros/bits_per_byte is not in the log of salt \(did you mean valid/prose/bits_per_byte\?\)"
    ):
        arms[1].band("valid/pros/bits_per_byte")


def test_seeds_of_different_length_are_compared_at_the_steps_that_both_have(tmp_path: Path) -> None:
    long = write_run(tmp_path / "a", [4.0] * 4, evaluated(3.0, 2.0, 1.0))
    short = write_run(tmp_path / "b", [4.0] * 2, evaluated(3.0, 2.5))
    (arm,) = arms_of([("a", read_curve("a", path)) for path in (long, short)])
    assert arm.band(BITS).mean.tolist() == [3.0, 2.25] and arm.last_common_step() == 2
    np.testing.assert_array_equal(arm.when("seconds", np.array([0, 2])), [0.0, 1.0])
