"""Jobs as processes of this machine: at most so many at once, each with its share of the cores and GPUs, none left behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_salt
from megatron_salt.errors import UserError
from megatron_salt.study.job import Job
from megatron_salt.study.jobs.job_process import LEAVE_SECONDS

_OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a program takes itself for a rank of the launch that the study was started in"""


@dataclass(frozen=True)
class _Started:
    job: Job
    slot: int
    process: subprocess.Popen[bytes]


class LocalJobs:
    """The jobs that run on this machine. Invariant: at most `at_once`, and after `stop` or `kill` none."""

    def __init__(self, at_once: int, leave_seconds: float = LEAVE_SECONDS) -> None:
        """at_once: --local. leave_seconds: what a run has to save when the study leaves. UserError where GPUs cannot be shared."""
        if at_once < 1:
            raise UserError(f"--local must be at least 1 job at a time, got {at_once}")
        self._devices = shares_of_gpus(visible_gpus(os.environ), at_once)
        self._at_once, self._leave_seconds = at_once, leave_seconds
        self._started: dict[str, _Started] = {}

    @property
    def has_room(self) -> bool:
        """Whether another job may start."""
        return len(self._started) < self._at_once

    def start(self, job: Job) -> None:
        """Start a job. Its directory is made. Raises OSError."""
        assert self.has_room and job.name not in self._started
        slot = min(set(range(self._at_once)) - {one.slot for one in self._started.values()})
        job.directory.mkdir(parents=True, exist_ok=True)
        job.outcome.unlink(missing_ok=True)
        words = ["--directory", str(job.directory), "--ranks", str(job.ranks), "--parent", str(os.getpid())]
        words += ["--leave-seconds", str(self._leave_seconds), *(["--trains"] if job.trains else []), "--", *job.command]
        with open(job.log, "ab") as log:
            log.write(f"== {time.strftime('%F %T')} {shlex.join(job.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_salt.study.jobs.job_process", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
                env=environment_of(job, os.environ, self._at_once, self._devices[slot], _num_cores()),
            )  # fmt: skip
        self._started[job.name] = _Started(job, slot, process)

    def ended(self) -> list[Job]:
        """The jobs that have ended since the last call."""
        over = [one for one in self._started.values() if one.process.poll() is not None]
        for one in over:
            _kill_group(one.process)  # nothing, unless its process was killed and could not clean up
            del self._started[one.job.name]
        return [one.job for one in over]

    def ask_to_leave(self) -> None:
        """Let every run save and leave. `ended` tells when it has."""
        for one in self._started.values():
            with contextlib.suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End everything at once; nothing is saved."""
        for one in self._started.values():
            _kill_tree(one.process)
        self._started.clear()


def environment_of(job: Job, inherited: Mapping[str, str], at_once: int, devices: str | None, num_cores: int) -> dict[str, str]:
    """The environment of a job. Pure but for the place of this package.

    OMP_NUM_THREADS, unless it is set, shares the cores among jobs and ranks. devices: CUDA_VISIBLE_DEVICES; None: as inherited.
    """
    environment = {name: value for name, value in inherited.items() if name not in _OF_A_LAUNCH}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // (at_once * max(1, job.ranks)))))
    root = str(Path(megatron_salt.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [inherited.get("PYTHONPATH")])])
    environment["PYTHONUNBUFFERED"] = "1"
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    return environment


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them: what it lists, or else all of /dev."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [] if listed.strip() in ("", "-1") else [name.strip() for name in listed.split(",")]
    return [str(number) for number in range(sum(path.name[6:].isdecimal() for path in devices.glob("nvidia[0-9]*")))]


def shares_of_gpus(gpus: Sequence[str], at_once: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each place where a job runs: equal shares; None without GPUs. UserError where there are too few. Pure."""
    if not gpus:
        return [None] * at_once
    each = len(gpus) // at_once
    if each == 0:
        raise UserError(
            f"--local {at_once}: this machine shows {len(gpus)} GPUs, fewer than jobs at a time; CUDA_VISIBLE_DEVICES= hides them"
        )
    return [",".join(gpus[place * each : (place + 1) * each]) for place in range(at_once)]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a job's process and its program. The ranks of torchrun have sessions of their own, so they are looked up."""
    import psutil

    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
    _kill_group(process)
    for one in below:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()
