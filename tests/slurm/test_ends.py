"""The words in which a run ends, as the launcher acts on them, and where its next start goes on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_for
from tests.slurm.jobs import BYTES, ON_ONE_NODE, TINY, Site
from tests.support.program import checkpoints, numbers

pytestmark = pytest.mark.slurm

FAULTY = """\
import runpy, sys
from unittest import mock
import torch

def fail(*_):
    raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1, set_device=fail).start()
sys.argv = sys.argv[2:]  # without -m
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

RUN = (*TINY, *BYTES, "--global-batch-size", "4")


@pytest.mark.long
def test_what_is_not_finite_is_not_started_again(site: Site, data: str) -> None:
    job = site.submit("baseline_2p8b.sh", *RUN, "--train-iters", "20", "--lr", "1e30", "--clip-grad", "0", "--weight-decay", "0",
                      options=ON_ONE_NODE,
                      RUN_DIR=site.work / "not-finite", DATA=data)  # fmt: skip
    assert job.end(120) == "FAILED"
    assert "error: not finite, and not started again: " in job.log and job.log.count("tasks, rank 0 at") == 1, job.log
    assert "ExitCode=4:0" in site.cluster.ask("scontrol", "show", "job", "--oneliner", job.number)


@pytest.mark.parametrize("found_by", [pytest.param("the check", marks=pytest.mark.long), "a rank"])
def test_the_job_goes_on_without_a_host_whose_gpu_is_dead(site: Site, data: str, found_by: str) -> None:
    """Slurm gives the job node1, whose GPU does not answer; the run is done on node2."""
    python, faulty = site.work / "python-on-a-faulty-node", site.work / "faulty.py"
    faulty.write_text(FAULTY)
    passed_over = "" if found_by != "a rank" else ' [[ " $* " == *" --dry-run "* ]] ||'
    python.write_text(
        f'#!/usr/bin/env bash\n[ "$SLURMD_NODENAME" != node1 ] ||{passed_over} exec {sys.executable} {faulty} "$@"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    job = site.submit("baseline_2p8b.sh", *RUN, "--train-iters", "4", options=ON_ONE_NODE, DATA=data, PYTHON=python, DEVICE="auto",
                      RUN_DIR=site.work / f"faulty {found_by}".replace(" ", "-"))  # fmt: skip
    log = job.complete()
    assert "the job goes on without host node1: " in log and "uncorrectable ECC error" in log and "done: step 4" in log, log
    assert "start 2.1: 1 tasks, rank 0 at node2" in log and ("start 1.1: " in log) == (found_by == "a rank"), log
    shown = site.cluster.ask("scontrol", "show", "job", "--oneliner", job.number)
    assert "ExcNodeList=node1 " in shown and "NodeList=node2 " in shown and "Restarts=1 " in shown


@pytest.mark.long
def test_what_cannot_be_saved_is_tried_once_more(site: Site, data: str) -> None:
    """No file may be larger than 64 KiB; a checkpoint's are."""
    bounded = site.work / "bounded-python"
    bounded.write_text(f'#!/usr/bin/env bash\nulimit -f 64\nexec {site.environment["PYTHON"]} "$@"\n')
    bounded.chmod(0o755)
    job = site.submit("baseline_2p8b.sh", *RUN, "--train-iters", "4", "--on-save-error", "continue", options=ON_ONE_NODE,
                      RUN_DIR=site.work / "unsaved", DATA=data, PYTHON=bounded, PAUSE=1)  # fmt: skip
    assert job.end(180) == "FAILED"
    told = [line for line in ("could not be saved, started once more: ", "error: the last of the work could not be saved, twice: ")
            if line in job.log]  # fmt: skip
    assert len(told) == 2 and job.log.count("tasks, rank 0 at") == 2 and "Traceback" not in job.log, job.log
    assert "ExitCode=3:0" in site.cluster.ask("scontrol", "show", "job", "--oneliner", job.number)


@pytest.mark.long
def test_a_job_that_began_elsewhere_goes_on_from_what_it_has_saved_itself(site: Site, data: str) -> None:
    """`--load` names the first start's checkpoint; later starts would lose what came after it."""
    first, branch = site.work / "trunk", site.work / "branch"
    flags = (*RUN, "--save-interval", "30", "--keep-last", "9")
    site.submit("baseline_2p8b.sh", *flags, "--train-iters", "150", options=ON_ONE_NODE, RUN_DIR=first, DATA=data).complete()
    job = site.submit("baseline_2p8b.sh", *flags, "--train-iters", "150", "--load", str(first / "iter_0000030"), options=ON_ONE_NODE,
                      RUN_DIR=branch, DATA=data, PAUSE=1)  # fmt: skip
    wait_for(lambda: 60 in checkpoints(branch) if branch.is_dir() else False, 120, job.log)
    os.kill(site.tiny_processes(str(branch))[-1], signal.SIGKILL)
    assert job.complete().count("tasks, rank 0 at") == 2
    assert numbers(branch) == numbers(first)[30:]
    assert Path(first / "iter_0000030").is_dir()
