"""A study's jobs on a Slurm that only remembers what it was asked. tests/slurm/test_study.py has the real one."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_salt.errors import UserError
from megatron_salt.study.execute import run_jobs
from megatron_salt.study.job import Job, SlurmOptions
from megatron_salt.study.jobs.slurm import SlurmJobs, batch_script, sbatch_options
from megatron_salt.study.jobs.status import WAITING, Status, blocked
from megatron_salt.train.launcher import Word, write_outcome
from tests.study.jobs.fake_slurm import FakeSlurm
from tests.study.jobs.small_jobs import job, wait_for

ROOT = Path(__file__).parents[3]
CPU = SlurmOptions(gpus_per_node=None, ranks_per_node=1, cpus_per_task=1)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.chdir(ROOT)  # examples/launch.sh
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def chain(base: Path) -> list[Job]:
    """teacher <- salt; plain stands alone."""
    return [job(base, "teacher"), job(base, "salt", needs=("teacher",)), job(base, "plain")]


def end(one: Job, slurm: FakeSlurm, number: str, word: Word | None = "done", state: str = "COMPLETED") -> None:
    """Let a Slurm job be over."""
    slurm.set(number, state)
    if word is not None:
        write_outcome(str(one.outcome), word, 5, "as the test says")


def test_each_job_is_one_slurm_job_after_what_it_needs(tmp_path: Path, slurm: FakeSlurm) -> None:
    jobs = chain(tmp_path)
    statuses = {one.name: WAITING for one in jobs}
    queue = SlurmJobs(CPU, tmp_path, looks=1)
    statuses |= queue.submit(jobs, statuses)
    assert slurm.names == ["teacher", "salt", "plain"] and {status.state for status in statuses.values()} == {"queued"}
    words = slurm.jobs["101"][2]
    assert "--dependency=afterok:100" in words and "--kill-on-invalid-dep=yes" in words
    assert not any(word.startswith("--dependency") for word in slurm.jobs["100"][2] + slurm.jobs["102"][2])
    assert json.loads((tmp_path / "slurm.json").read_text()) == {"teacher": "100", "salt": "101", "plain": "102"}

    slurm.set("100", "RUNNING")
    statuses |= queue.look(jobs, statuses)
    assert [statuses[one.name].state for one in jobs] == ["running", "queued", "queued"]
    slurm.silent(True)  # a controller that does not answer changes nothing
    assert queue.look(jobs, statuses) == {}
    slurm.silent(False)
    end(jobs[0], slurm, "100")
    end(jobs[2], slurm, "102", None, "FAILED")
    jobs[2].outcome.write_text("refused - see the log\n")  # as examples/task.sh writes it
    jobs[2].log.write_text("error: no scores\nsrun: error: exit code 2\n2026-01-01 00:00:00 | error: refused: see the log\n")
    statuses |= queue.look(jobs, statuses)
    assert statuses["teacher"] == Status("done") and statuses["plain"] == Status("failed", "refused: no scores")


def test_a_second_start_submits_what_is_neither_done_nor_queued(tmp_path: Path, slurm: FakeSlurm) -> None:
    jobs = chain(tmp_path)
    statuses = {one.name: WAITING for one in jobs}
    SlurmJobs(CPU, tmp_path).submit(jobs, statuses)
    end(jobs[0], slurm, "100")
    slurm.set("102", "CANCELLED")  # plain is gone without a word, salt is still in the queue
    again = statuses | {"teacher": Status("done")}
    assert SlurmJobs(CPU, tmp_path).submit(jobs, again) == {"salt": Status("queued"), "plain": Status("queued")}
    assert (
        slurm.names == ["teacher", "salt", "plain", "plain"]
        and json.loads((tmp_path / "slurm.json").read_text())["plain"] == "103"
    )
    slurm.set("101", "CANCELLED")
    SlurmJobs(CPU, tmp_path).submit(jobs, again)  # what it needs is done: nothing to wait for
    assert slurm.names[4:] == ["salt"] and not any(word.startswith("--dependency") for word in slurm.jobs["104"][2])


def test_what_waits_for_a_job_that_failed_waits_for_its_successor(tmp_path: Path, slurm: FakeSlurm) -> None:
    jobs = chain(tmp_path)
    statuses = {one.name: WAITING for one in jobs}
    SlurmJobs(CPU, tmp_path).submit(jobs, statuses)
    slurm.set("100", "FAILED")  # and Slurm has not yet cancelled 101, which needs it
    SlurmJobs(CPU, tmp_path).submit(jobs, statuses)
    assert slurm.names[3:] == ["teacher", "salt"] and slurm.jobs["101"][1] == "CANCELLED"
    assert "--dependency=afterok:103" in slurm.jobs["104"][2]


def test_a_job_that_is_gone_without_a_word_died_after_some_looks(tmp_path: Path, slurm: FakeSlurm) -> None:
    jobs = chain(tmp_path)
    queue = SlurmJobs(CPU, tmp_path, looks=2)
    statuses: dict[str, Status] = {one.name: WAITING for one in jobs}
    statuses |= queue.submit(jobs, statuses)
    jobs[0].log.write_text("2026-01-01 00:00:00 | error: stopped: 3 restarts in a row ended without progress\nmore\n")
    end(jobs[0], slurm, "100", None, "FAILED")
    slurm.set("101", "CANCELLED")  # Slurm does that to what needs it
    statuses |= queue.look(jobs, statuses)
    assert [statuses[one.name].state for one in jobs] == ["queued", "queued", "queued"]  # the file system may be late
    statuses |= queue.look(jobs, statuses)
    reason = "died as Slurm job 100: Slurm says FAILED, stopped: 3 restarts in a row ended without progress"
    assert statuses["teacher"] == Status("failed", reason) and statuses["salt"] == Status("not run", "needs teacher")
    assert blocked(jobs, statuses) == {} and statuses["plain"].state == "queued"


def test_refusals(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = chain(tmp_path)
    statuses = {one.name: WAITING for one in jobs}
    with pytest.raises(UserError, match="sbatch refuses job teacher: sbatch: error: invalid partition specified: none"):
        SlurmJobs(dataclasses.replace(CPU, partition="none"), tmp_path).submit(jobs, statuses)
    slurm.silent(True)
    with pytest.raises(UserError, match="squeue does not answer; nothing was submitted"):
        SlurmJobs(CPU, tmp_path).submit(jobs, statuses)
    for content in ("[1]", "{", '{"a": 1}'):
        (tmp_path / "slurm.json").write_text(content)
        with pytest.raises(UserError, match=r"slurm\.json"):
            SlurmJobs(CPU, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="start the study from the repository's root"):
        SlurmJobs(CPU, tmp_path)


def test_the_options_of_sbatch(tmp_path: Path) -> None:
    def options(ranks: int, **changes: object) -> list[str]:
        site = SlurmOptions(**({"partition": "h100", "account": "us", "time": "2:00:00"} | changes))  # type: ignore[arg-type]
        return sbatch_options(dataclasses.replace(job(tmp_path, "a"), ranks=ranks), site, ())

    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--mem=0", "--partition=h100", "--account=us", "--time=2:00:00",
            "--requeue", "--open-mode=append", "--signal=B:USR1@300", f"--output={tmp_path}/a/log.txt"} <= set(options(16))  # fmt: skip
    assert {"--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=h100:2"} <= set(options(2, gpus_per_node="h100:8"))
    assert not any(word.startswith(("--gpus", "--mem")) for word in options(0))
    assert options(1, sbatch_args=("--mem=9G", "--time=5"))[-2:] == ["--mem=9G", "--time=5"]
    with pytest.raises(UserError, match="job a: 9 ranks do not fill nodes of 8"):
        options(9)
    with pytest.raises(UserError, match="slurm: ranks_per_node must be at least 1, got 0"):
        options(1, ranks_per_node=0)


def test_the_script_leaves_to_launch_sh_what_it_adds(tmp_path: Path) -> None:
    own = tmp_path / "a run's"
    flags = ("--save", str(own), "--load", str(own), "--exit-signal-handler", "--lr", "1e-3", "--data-path", "a b")
    run = dataclasses.replace(job(tmp_path, "a"), command=("-m", "megatron_salt.pretrain", *flags), directory=own, ranks=1)
    script = batch_script(run, CPU)
    assert "train --lr 1e-3 --data-path 'a b'\n" in script and "export DEVICE=cpu" in script
    other = dataclasses.replace(run, command=(*run.command[:2], f"--save={own}", "--load=elsewhere", "--finetune"))
    assert "train --load elsewhere --finetune\n" in batch_script(other, SlurmOptions())
    tool = dataclasses.replace(job(tmp_path, "b"), command=("tools/select_data.py", "--fraction", "0.5"), directory=own)
    assert 'run_tool "$PYTHON" tools/select_data.py --fraction 0.5\n' in batch_script(tool, CPU)
    for text in (script, batch_script(tool, CPU)):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""


def test_a_study_watches_slurm_until_all_is_over(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_salt.study.execute.SLURM_POLL_SECONDS", 0.05)
    jobs, out = chain(tmp_path), io.StringIO()

    def work() -> None:
        wait_for(lambda: len(slurm.names) == 3)
        for number, one in zip(("100", "102", "101"), (jobs[0], jobs[2], jobs[1]), strict=True):
            end(one, slurm, number)

    found = in_background(work, lambda: run_jobs(jobs, tmp_path, 1, slurm=CPU, out=out))
    assert found == 0 and "3 of 3 jobs done" in out.getvalue()


def test_a_signal_ends_the_look_and_not_the_jobs(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_salt.study.execute.SLURM_POLL_SECONDS", 0.05)
    out = io.StringIO()

    def interrupt() -> None:
        wait_for(lambda: len(slurm.names) == 3)
        os.kill(os.getpid(), signal.SIGTERM)

    found = in_background(interrupt, lambda: run_jobs(chain(tmp_path), tmp_path, 1, slurm=CPU, out=out))
    assert found == 128 + signal.SIGTERM and "the jobs stay in Slurm's queue" in out.getvalue()
    assert [state for _, state, _ in slurm.jobs.values()] == ["PENDING"] * 3


def in_background(work: Callable[[], None], action: Callable[[], int]) -> int:
    """`action`, while a thread does `work`. If that fails, the study is told to leave: a failure, not a wait."""

    def guarded() -> None:
        try:
            work()
        except BaseException:
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        return action()
    finally:
        thread.join()
