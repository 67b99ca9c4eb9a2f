"""What cannot run ends at once, with the reason in the job's log, before the trainer starts anywhere; what gets nowhere is stopped."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_for
from tests.slurm.jobs import BYTES, ON_ONE_NODE, ON_TWO_NODES, ROOT, TINY, Site
from tests.support.program import entries

pytestmark = pytest.mark.slurm

RUN = (*TINY, *BYTES, "--global-batch-size", "4", "--train-iters", "4")


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "examples").glob("*.sh") if "#SBATCH" in path.read_text())
)
def test_slurm_takes_the_header_as_it_is(site: Site, script: str) -> None:
    """But for the nodes, of which there are two here."""
    assert site.submit(script, options=("--test-only", "--nodes=1-2")).number == ""


@pytest.mark.parametrize(
    "what, options, flags, environment, reason",
    [
        ("data", ON_TWO_NODES, (), {"DATA": "/nowhere/words"}, "/nowhere/words"),
        ("teacher", ON_TWO_NODES, (), {"TEACHER": "/nowhere/teacher"}, "--teacher-load /nowhere/teacher holds no checkpoint"),
        ("nodes", ON_ONE_NODE, ("--pipeline-model-parallel-size", "2"), {}, "1 ranks cannot hold whole replicas"),
        (
            "another run",
            ON_TWO_NODES,
            (),
            {"RUN_DIR": "teacher's"},
            "holds another architecture: --hidden-size is 16 there and 32 here",
        ),
    ],
)
def test_the_job_ends_before_anything_is_started(
    site: Site, data: str, teacher: Path, what, options, flags, environment, reason
) -> None:
    run = site.work / f"refused {what}".replace(" ", "-")
    if what == "another run":
        shutil.copytree(teacher, run, ignore=shutil.ignore_patterns("logs"))
    given = {"DATA": data, "TEACHER": teacher} | environment | {"RUN_DIR": run}
    job = site.submit(
        "salt_2p8b.sh", *RUN, "--teacher-micro-batch-size", "1", "--kd-steps", "2", *flags, options=options, **given
    )
    assert job.end(60) == "FAILED"
    assert f"error: {reason}" in job.log or reason in job.log.split("error: ", 1)[1].splitlines()[0], job.log
    assert "rank 0 at" not in job.log and "Traceback" not in job.log


def test_a_job_that_gets_no_further_is_stopped(site: Site, data: str, tmp_path: Path) -> None:
    """Its processes die at once, again and again; the check before the start, which is the same program, does not."""
    dying = site.work / "dying-python"
    dying.write_text(
        f'#!/usr/bin/env bash\ncase " $* " in *" --dry-run "*) exec {site.environment["PYTHON"]} "$@" ;; esac\nkill -9 $$\n'
    )
    dying.chmod(0o755)
    job = site.submit("baseline_2p8b.sh", *RUN, options=ON_ONE_NODE, RUN_DIR=site.work / "endless", DATA=data, PYTHON=dying,
                      MAX_RESTARTS=2, PAUSE=1)  # fmt: skip
    assert job.end(90) == "FAILED"
    assert [line for line in ("start 1.1:", "start 1.2:", "start 1.3:", "start 1.4:") if line in job.log] == [
        "start 1.1:", "start 1.2:", "start 1.3:"]  # fmt: skip
    assert "error: stopped: 2 restarts in a row ended without progress (0)" in job.log


def test_a_cancelled_job_stays_cancelled(site: Site, data: str) -> None:
    job = site.submit(
        "baseline_2p8b.sh", *RUN, "--train-iters", "100000", options=ON_ONE_NODE, RUN_DIR=site.work / "cancelled", DATA=data
    )
    job.wait_for(r"step \d+/100000")
    site.cluster.ask("scancel", job.number)
    assert job.end(60) == "CANCELLED"
    wait_for(lambda: "left because of TERM" in job.log, 60, job.log)
    time.sleep(3)
    assert job.state == "CANCELLED"


@pytest.mark.long
def test_two_jobs_do_not_share_a_directory_and_a_finished_run_has_nothing_to_do(site: Site, data: str) -> None:
    """What jobs of the same number left in the directory before is not believed."""
    run = site.work / "shared"
    first = site.submit("baseline_2p8b.sh", *RUN, "--train-iters", "60", options=ON_ONE_NODE, RUN_DIR=run, DATA=data)
    logs = run / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "launches").write_text(f"{first.number} 0 99\n")
    (logs / "outcome-of-another-job").write_text("done 60 job 1.0 long ago\n")
    first.wait_for("rank 0 at")
    second = site.submit("baseline_2p8b.sh", *RUN, "--train-iters", "60", options=ON_ONE_NODE, RUN_DIR=run, DATA=data)
    assert second.end(60) == "FAILED"
    assert f"error: job {first.number} is running in RUN_DIR {run}" in second.log
    assert "done: step 60" in first.complete()
    again = site.submit("baseline_2p8b.sh", *RUN, "--train-iters", "60", options=ON_ONE_NODE, RUN_DIR=run, DATA=data).complete()
    assert "nothing to train" in again and "done: step 60" in again
    assert len(entries(run)) == 60
