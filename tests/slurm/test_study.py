"""A study on Slurm: one Slurm job a job, in the order of needs; a failure stops what needs it; a second start submits nothing twice."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from megatron_salt.study import execute
from megatron_salt.study.execute import run_jobs
from megatron_salt.study.job import Job, SlurmOptions
from megatron_salt.study.jobs.outcome import read_outcome
from megatron_salt.study.jobs.slurm import SlurmJobs
from megatron_salt.study.jobs.status import WAITING
from tests.slurm.cluster import wait_for
from tests.slurm.jobs import BYTES, ROOT, TINY, Site
from tests.support.program import checkpoints, entries

pytestmark = [pytest.mark.slurm, pytest.mark.long]

OPTIONS = SlurmOptions(
    gpus_per_node=None, ranks_per_node=1, cpus_per_task=1, partition="normal", time="10", sbatch_args=("--mem=100M",)
)


def jobs_of(base: Path, data: str) -> list[Job]:
    """select <- salt (two ranks on two nodes); bad <- child."""

    def tool(name: str, program: str, *needs: str) -> Job:
        return Job(name=name, kind="select", command=("-c", program), ranks=0, directory=base / name, needs=needs)

    save = base / "salt"
    flags = (*TINY, *BYTES, "--data-path", data, "--global-batch-size", "4", "--train-iters", "30", "--save-interval", "5",
             "--save", str(save), "--load", str(save), "--exit-signal-handler")  # fmt: skip
    return [
        tool("select", f"open({str(base / 'selected')!r}, 'a').write('x')"),
        Job(name="salt", kind="run", command=("-m", "megatron_salt.pretrain", *flags), ranks=2, directory=save, needs=("select",),
            arm="salt", seed=1, steps=30),
        tool("bad", "import sys; print('error: no scores', file=sys.stderr); sys.exit(2)"),
        tool("child", "pass", "bad"),
    ]  # fmt: skip


def test_a_study_on_slurm(site: Site, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = site.work / "study"
    base.mkdir()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(execute, "SLURM_POLL_SECONDS", 1.0)
    for name, value in (site.cluster.environment | site.environment).items():
        monkeypatch.setenv(name, value)
    jobs, out = jobs_of(base, data), io.StringIO()

    # A first start submits all and goes away. In between the run is requeued, and one job is refused. A second start finds the run in the
    # queue, and submits the refused one again, which waits for nothing that is done.
    SlurmJobs(OPTIONS, base).submit(jobs, {job.name: WAITING for job in jobs})
    numbers = json.loads((base / "slurm.json").read_text())
    wait_for(lambda: (base / "salt/latest_checkpointed_iteration.txt").exists(), 120, "the run does not save")
    site.cluster.ask("scontrol", "requeue", numbers["salt"])
    assert run_jobs(jobs, base, 1, slurm=OPTIONS, out=out) == 1
    again = json.loads((base / "slurm.json").read_text())
    assert (again["select"], again["salt"]) == (numbers["select"], numbers["salt"]) and again["bad"] != numbers["bad"]
    shown = out.getvalue()
    assert "2 of 4 jobs done, 1 failed, 1 not run" in shown
    assert "bad: failed: refused: no scores" in shown and "child: not run: needs bad" in shown
    assert (base / "selected").read_text() == "x" and checkpoints(base / "salt")[-1] == 30
    assert [entry["step"] for entry in entries(base / "salt")] == list(range(1, 31))
    outcome = read_outcome(base / "salt/outcome.txt")
    assert outcome is not None and (outcome.word, outcome.step) == ("done", 30)
    assert "start 2.1" in (base / "salt/log.txt").read_text()
