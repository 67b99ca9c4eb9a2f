"""salt_2p8b.sh through everything that ends a job early: the loss curve is that of a run which nothing happened to, bit for bit.

Two nodes, the student's two pipeline stages across them (or its two tensor-parallel halves), a teacher on each in stage 1.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_for
from tests.slurm.jobs import BYTES, ON_TWO_NODES, TINY, Job, Site, last_step
from tests.support.program import checkpoints, numbers

pytestmark = pytest.mark.slurm

STEPS, KD_STEPS, SAVES = 60, 25, 15
LAYOUTS = {"pp": ("--pipeline-model-parallel-size", "2"), "tp": ("--tensor-model-parallel-size", "2", "--sequence-parallel")}


def start(site: Site, data: str, teacher: Path, run: Path, layout: str, *flags: str, options: tuple[str, ...] = ()) -> Job:
    return site.submit(
        "salt_2p8b.sh", *TINY, *BYTES, *LAYOUTS[layout], "--global-batch-size", "8", "--train-iters", str(STEPS),
        "--save-interval", str(SAVES), "--teacher-micro-batch-size", "2", *flags, options=(*ON_TWO_NODES, *options),
        RUN_DIR=run, DATA=data, TEACHER=teacher, KD_STEPS=KD_STEPS, HANG_MINUTES=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(site: Site, data: str, teacher: Path) -> Callable[[str], Path]:
    """The run that nothing happens to, by layout."""
    runs: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in runs:
            runs[layout] = site.work / f"undisturbed-{layout}"
            log = start(site, data, teacher, runs[layout], layout).complete()
            assert log.count("tasks, rank 0 at") == 1 and f"done: step {STEPS}" in log
            of_nodes = {path.name: path.read_text() for path in runs[layout].glob("logs/*/*.log")}
            assert set(of_nodes) == {"node1.log", "node2.log"} and f"step {STEPS}/{STEPS}" in of_nodes["node2.log"]
        return runs[layout]

    return of


def at_step(job: Job, run: Path, step: int) -> None:
    wait_for(lambda: last_step(run) >= step, 120, f"step {step} does not come:\n{job.log}")


def time_limit(site: Site, job: Job, run: Path) -> None:
    """One minute, with SIGUSR1 ahead of its end."""
    job.wait_for("left because of USR1", 180)
    site.cluster.ask("scontrol", "update", f"jobid={job.number}", "timelimit=10")  # once is enough


def requeue(site: Site, job: Job, run: Path) -> None:
    at_step(job, run, 20)
    site.cluster.ask("scontrol", "requeue", job.number)


def requeue_while_importing(site: Site, job: Job, run: Path) -> None:
    """SIGTERM before the trainer listens, and then again."""
    job.wait_for("tasks, rank 0 at")
    site.cluster.ask("scontrol", "requeue", job.number)


def preemption(site: Site, job: Job, run: Path) -> None:
    at_step(job, run, 20)
    urgent = site.submit("preprocess.sh", options=("--partition=urgent", "--array=0", "--nodes=2", "--exclusive", "--mem=100M"),
                         RUN_DIR=run.parent / "urgent", INPUT="/nowhere.jsonl")  # fmt: skip
    urgent.end()


def power_cut(site: Site, job: Job, run: Path) -> None:
    if not site.cluster.can_cut_power:
        pytest.skip("nodes are no namespaces here")
    at_step(job, run, 20)
    site.cluster.cut_power("node2")
    wait_for(lambda: job.state != "RUNNING", 90, "nobody notices")
    site.cluster.power_on("node2")


def killed_process(site: Site, job: Job, run: Path) -> None:
    wait_for(lambda: SAVES in checkpoints(run), 120, job.log)
    os.kill(site.tiny_processes(str(run))[-1], signal.SIGKILL)


def stopped_process(site: Site, job: Job, run: Path) -> None:
    """One that neither dies nor goes on: the others wait for it in a collective, for longer than HANG_MINUTES."""
    at_step(job, run, 20)
    os.kill(site.tiny_processes(str(run))[-1], signal.SIGSTOP)
    job.wait_for("hangs: no step went by for 1 minutes", 120)


RESTARTS = {  # how often Slurm starts the job anew, and how often the job its processes
    time_limit: ("pp", 1, 1),
    requeue_while_importing: ("pp", 1, 1),
    preemption: ("pp", 1, 1),
    power_cut: ("tp", 1, 1),
    killed_process: ("tp", 0, 2),
    stopped_process: ("pp", 0, 2),
    requeue: ("pp", 1, 1),
}


@pytest.mark.parametrize(
    "disturb", [pytest.param(one, marks=[] if one is requeue else [pytest.mark.long], id=one.__name__) for one in RESTARTS]
)
def test_the_curve_is_that_of_an_undisturbed_run(site, data, teacher, undisturbed, disturb):
    layout, restarts, starts = RESTARTS[disturb]
    expected = numbers(undisturbed(layout))
    run = site.work / disturb.__name__
    options, flags = (), ()
    if disturb is time_limit:  # evaluations, which change no number, keep the run from being over before its minute is
        options = ("--time=1", "--signal=B:USR1@1")
        flags = ("--valid-data-path", data, "--allow-valid-in-train", "--eval-interval", "1", "--eval-iters", "30")
    job = start(site, data, teacher, run, layout, *flags, options=options)
    disturb(site, job, run)
    log = job.complete(400)
    assert f"start {restarts + 1}.{starts}:" in log and f"done: step {STEPS}" in log
    assert [step for step, *_ in expected] == list(range(1, STEPS + 1))
    assert numbers(run) == expected
