"""A report's content and files: every run in them, verdicts for the primary question alone, all files or none."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_salt.config import RunConfig
from megatron_salt.config.run import sections
from megatron_salt.errors import UserError
from megatron_salt.selection.selection_file import write_selection
from megatron_salt.study.definition.study import PrimaryQuestion
from megatron_salt.study.report.content import Report, report_of
from megatron_salt.study.report.markdown import to_markdown
from megatron_salt.study.report.selections import selection_section
from megatron_salt.study.report.tables import Table
from megatron_salt.study.report.write import write_report
from megatron_salt.study.results import RunResult
from tests.study.report.runs import FACTS, STAGE1, STEPS, study_runs
from tests.support.selections import manifest_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    return study_runs(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def report(runs: list[RunResult]) -> Report:
    return report_of(FACTS, runs, selection_section(runs))


@pytest.fixture(scope="module")
def files(runs: list[RunResult], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{name: file} of a report that stands over an earlier one."""
    output = tmp_path_factory.mktemp("report")
    (output / "report.md").write_text("an earlier one")
    return {path.name: path for path in write_report(FACTS, runs, output)}


def tables(report: Report) -> dict[str, Table]:
    return {table.name: table for section in report.sections for table in section.tables}


def records(path: Path) -> list[Mapping[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_answer_has_the_verdict_the_interval_and_the_seeds(report: Report) -> None:
    """Differences are -0.5, -0.4, -0.45: mean -0.45, sd 0.05, half-width 4.3027 x 0.05 / sqrt(3) = 0.1242."""
    assert report.answer.verdict == "yes"
    for part in ("Yes: salt against baseline", "3 of 3 seeds", "-0.4500", "-0.5742 to -0.3258"):
        assert part in report.answer.sentence
    assert report.answer.accounts is not None
    assert [row[0] for row in report.answer.accounts.rows] == [
        "teacher existed",
        "teacher trained for this run",
        "teacher shared by several runs",
    ]


def test_the_accounts_are_shares_of_the_baseline_s_run(report: Report) -> None:
    """SALT is better at step 36 of 40. FLOPs: 0.8e12 a step, 0.1e12 of the teacher in each of 12, and 4e12 of its training."""
    student = 0.8e12
    flops = {account: (36 * student + STAGE1 * 1e11 + before) / (STEPS * student) for account, before in
             (("existed", 0), ("trained", 4e12), ("shared", 4e11))}  # fmt: skip
    assert report.answer.accounts is not None
    shown = [row[1] for row in report.answer.accounts.rows]
    assert shown == [f"3 of 3 reached, at {', '.join([f'{share:.1%}'] * 3)}" for share in flops.values()]


def test_all_but_the_primary_question_is_exploratory(report: Report) -> None:
    verdicts = [row[-1] for row in tables(report)["comparisons"].rows]
    assert verdicts == ["yes", *["exploratory"] * 8]
    exploratory = {section.name for section in report.sections if section.exploratory}
    assert exploratory == {"curves", "passing", "equal", "teacher", "economics"}


def test_two_seeds_give_a_direction_and_no_question_gives_no_verdict(runs: list[RunResult]) -> None:
    two = report_of(FACTS, [run for run in runs if run.seed < 3], selection_section([]))
    assert two.answer.verdict == "direction only" and "interval" not in two.answer.sentence
    none = report_of(replace(FACTS, primary=None), runs, selection_section([]))
    assert none.answer.verdict is None and none.answer.accounts is None
    assert {row[-1] for row in tables(none)["comparisons"].rows} == {"exploratory"}


def test_a_study_without_the_arms_of_its_question_still_has_a_report(runs: list[RunResult], tmp_path: Path) -> None:
    waiting = [replace(run, state="waiting", curve=None) for run in runs]
    for some in ([run for run in runs if run.arm != "baseline"], [run for run in runs if run.arm != "salt"], waiting, []):
        made = report_of(FACTS, some, selection_section(some))
        assert made.answer.verdict in (None, "no pair")
        assert to_markdown(made, ()).startswith("## Study")
    assert "report.md" in {path.name for path in write_report(FACTS, waiting, tmp_path)}


def test_a_question_about_another_arm_is_compared_with_that_arm(runs: list[RunResult]) -> None:
    facts = replace(FACTS, primary=PrimaryQuestion(arm="random", against="salt", figure="valid/docs/loss"))
    made = report_of(facts, runs, selection_section([]))
    assert {one.against for one in made.comparisons} == {"salt"} and made.answer.verdict == "direction only"


def test_runs_that_failed_diverged_or_wait_are_shown_with_their_reasons(report: Report) -> None:
    rows = [[row[0], row[1], row[2], row[7], row[8]] for row in tables(report)["runs"].rows]
    assert rows[:4] == [
        ["salt_ds", "2", "failed", "-", "out of memory | on <rank> 0"],
        ["salt_ds", "3", "finished", "step 30", "a figure is not finite at its end"],
        ["random", "3", "waiting", "-", "random is waiting"],
        ["baseline", "1", "finished", "-", "-"],
    ]
    assert len(rows) == 12 and "3 of 12 runs" in report.answer.warning
    names = [arm.name for arm, _ in report.curves]
    assert names == ["baseline", "salt", "salt_ds", "random", "salt_ds, seed 2 (failed)", "salt_ds, seed 3 (not finite)"]
    assert [len(arm.curves) for arm, _ in report.curves] == [3, 3, 1, 2, 1, 1]
    notes = next(section.notes for section in report.sections if section.name == "differences")
    assert "Left out: salt_ds against baseline, seed 2: salt_ds failed: out of memory | on <rank> 0." in notes


def test_the_switch_shows_memory_and_step_times_before_and_after(report: Report) -> None:
    rows = tables(report)["switch"].rows
    assert rows[0] == ["salt", "1", "step 12", "1.500", "1.250", "625 ms", "500 ms", "1.250"]
    assert [row[0] for row in rows] == ["salt"] * 3 + ["salt_ds"] * 2 + ["random"] * 2


def test_the_last_values_of_an_arm_have_its_spread(report: Report) -> None:
    """5 exp(-40 / 30) + 1 = 2.318, + 0.05 x seed, less the gain."""
    rows = {row[0]: list(row[1:]) for row in tables(report)["finals"].rows}
    assert rows["baseline"][:2] == ["3", "2.4180 (2.3680 to 2.4680)"] and rows["salt_ds"][:2] == ["1", "2.0680"]
    assert rows["salt_ds, seed 3 (not finite)"][:2] == ["1", "nan"]


def test_a_run_with_settings_is_compared_with_the_run_that_has_them_too(runs: list[RunResult]) -> None:
    faster = [replace(run, settings={"lr": "0.002"}) for run in runs if run.seed == 1 and run.arm in ("baseline", "salt")]
    other = [replace(runs[3], settings={"kd_weight": "0.5"})]
    made = report_of(FACTS, [*runs, *faster, *other], selection_section([]))
    compared = {one.arm: one for one in made.comparisons if one.figure == "valid/docs/loss"}
    assert list(compared) == ["salt", "salt_ds", "random", "salt lr=0.002", "salt kd_weight=0.5"]
    assert compared["salt lr=0.002"].seeds == compared["salt kd_weight=0.5"].seeds == (1,)
    assert [one.arm for one in made.comparisons if one.primary] == ["salt"]
    assert "baseline lr=0.002" in {arm.name for arm, _ in made.curves}


def test_what_cannot_be_matched_or_diverged_is_told_beside_the_tables(report: Report) -> None:
    notes = {section.name: section.notes for section in report.sections}
    diverged = "salt_ds, seed 3: its figures are not finite at its end; it ends here at its last finite one."
    assert notes["equal"][0] == diverged and "Left out: random against baseline, seed 3: random is waiting." in notes["equal"]
    assert "Left out: salt_ds against baseline, seed 2: salt_ds failed: out of memory | on <rank> 0." in notes["passing"]


def test_a_figure_that_no_log_has_is_told(report: Report) -> None:
    words = next(section.words for section in report.sections if section.name == "curves")
    assert words == ("In no run's log: valid/absent/bits_per_byte.",)


def drawing_from(run: RunResult, selection: Path) -> RunResult:
    """The run, with a configuration whose stage 1 draws from a selection."""
    config = RunConfig(**{name: section() for name, section in sections().items()})
    salt = replace(config.salt, stage1_selection=str(selection), kd_steps=4, kd_weight=0.0)
    return replace(run, config=replace(config, salt=salt))


def test_what_was_selected_and_its_ties(runs: list[RunResult], tmp_path: Path) -> None:
    rule = {"score": "median_dropped_10", "name": "top", "fraction": 0.25}
    (tmp_path / "early").mkdir()
    write_selection(
        str(tmp_path / "early/windows"), [np.arange(5)], num_selected=5, scores=manifest_of([16, 4]), rule=rule, valid_share=0.0,
        tie_share=0.2,
    )  # fmt: skip
    known, lost = drawing_from(runs[6], tmp_path / "early/windows.npy"), drawing_from(runs[9], tmp_path / "lost.npy")
    section = selection_section([known, replace(known, seed=9), lost])
    [table] = section.tables
    assert table.rows == [["early", "salt_ds", "5", "20", "25.0%", "top", "median_dropped_10", "20.0%", "7"]]
    [told] = section.words
    assert "random" in told and "lost" in told


# --- its files --------------------------------------------------------------------------------------------------------


def test_all_files_appear_and_no_other(files: dict[str, Path]) -> None:
    wanted = {"report.html", "report.md", "runs.csv", "evaluations.csv", "differences.png", "curves-valid-docs-loss.png",
              "curves-valid-prose-bits-per-byte.png", "curves-task-copy-acc.png"}  # fmt: skip
    directory = files["report.md"].parent
    assert set(files) == wanted == {path.name for path in directory.iterdir()}
    for name, path in files.items():
        assert not name.endswith(".png") or path.read_bytes().startswith(b"\x89PNG")


def test_a_report_that_fails_leaves_the_earlier_one(runs: list[RunResult], tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("an earlier one")
    with (
        mock.patch("megatron_salt.study.report.write.to_html", return_value="a page"),
        mock.patch("megatron_salt.study.report.write.draw_curves"),
        mock.patch("megatron_salt.study.report.write.draw_differences", side_effect=OSError("disk is full")),
        pytest.raises(UserError, match=f"the report in {tmp_path} cannot be written: disk is full"),
    ):
        write_report(FACTS, runs, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.md": "an earlier one"}


def test_a_directory_in_the_way_of_one_file_leaves_all_as_they_were(runs: list[RunResult], tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("an earlier one")
    (tmp_path / "runs.csv").mkdir()
    with pytest.raises(UserError, match=rf"the report in {tmp_path} cannot be written: runs\.csv: Is a directory"):
        write_report(FACTS, [replace(runs[0], curve=None)], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "runs.csv"}
    assert (tmp_path / "report.md").read_text() == "an earlier one"


def test_without_plotly_all_but_the_page_is_written_and_that_is_told(
    runs: list[RunResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        written = write_report(FACTS, [replace(runs[0], curve=None)], tmp_path)
    assert [path.name for path in written] == ["report.md", "runs.csv", "evaluations.csv"]
    assert "report.html is not written" in capsys.readouterr().out


def test_csv_has_a_row_for_each_run_and_each_evaluation(files: dict[str, Path], runs: list[RunResult]) -> None:
    rows = records(files["runs.csv"])
    assert [(row["arm"], int(row["seed"]), row["state"], row["reason"]) for row in rows] == [
        (run.arm, run.seed, run.state, run.reason) for run in runs
    ]
    salt = rows[3]
    assert float(salt["flops, teacher trained"]) == STEPS * 0.8e12 + STAGE1 * 1e11 + 4e12
    assert float(salt["seconds, teacher existed"]) == STAGE1 * 0.625 + (STEPS - STAGE1) * 0.5
    assert rows[8]["not_finite_from_step"] == "30" and rows[8]["last valid/docs/loss"] == "nan"
    evaluations = records(files["evaluations.csv"])
    assert len(evaluations) == sum(11 if run.state == "finished" else 3 if run.state == "failed" else 0 for run in runs)
    curve = runs[3].curve
    assert curve is not None
    own = {int(row["step"]): row for row in evaluations if (row["arm"], row["seed"]) == ("salt", "1")}
    assert {step: float(row["valid/docs/loss"]) for step, row in own.items()} == curve.of_evaluations["valid/docs/loss"]
    assert float(own[36]["flops"]) == 36 * 0.8e12 + STAGE1 * 1e11 and float(own[0]["seconds"]) == 0
    diverged = [row for row in evaluations if (row["arm"], row["seed"]) == ("salt_ds", "3")]
    assert math.isnan(float(diverged[-1]["valid/docs/loss"]))


def test_markdown_takes_nothing_for_markup(files: dict[str, Path], report: Report) -> None:
    text = files["report.md"].read_text()
    assert text.startswith("## Study laptop \\<b\\>\n") and "**Yes:** salt against baseline" in text
    row = next(line for line in text.splitlines() if "out of memory" in line and line.startswith("|"))
    assert "out of memory \\| on \\<rank\\> 0" in row and row.replace("\\|", "").count("|") == 10
    assert text.count("<details>") == text.count("</details>") > 3 and "<details><summary>The study</summary>\n\n" in text
    assert "```yaml\narms:\n" in text and "ledger-flops" not in text
    for name in (one for one in files if one.endswith(".png")):
        assert f"]({name})" in text
