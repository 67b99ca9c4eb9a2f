"""Jobs on Slurm: one Slurm job each, which waits by afterok for what it needs. What was submitted stands in STUDY/slurm.json.

Each is a batch script around examples/launch.sh, which starts a job again until it is done: after a time limit, preemption or a lost
node. A second start of the study submits what is neither done nor in the queue. Of Slurm it calls sbatch, squeue, scancel, and sacct
where there is accounting.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_salt.errors import UserError
from megatron_salt.files import write_whole
from megatron_salt.small_files import one_line, read_json
from megatron_salt.study.job import TRAINER, Job, SlurmOptions
from megatron_salt.study.jobs.outcome import SEE_LOG, last_error, read_outcome
from megatron_salt.study.jobs.status import QUEUED, RUNNING, Status, status_after

LAUNCHER = Path("examples/launch.sh")
RECORD = "slurm.json"
_WORKS = ("RUNNING", "COMPLETING")
_SECONDS = 60  # that a command of Slurm may take
_LOOKS = (
    6  # without a job in the queue and without its outcome, after which it counts as dead: a shared file system may be late
)


class SlurmJobs:
    """The jobs of a study on Slurm. Invariant: the record names every job that was submitted, also after a kill."""

    def __init__(self, options: SlurmOptions, study_dir: Path, looks: int = _LOOKS) -> None:
        """looks: see `_LOOKS`. Raises UserError where the record cannot be read, or this is not the directory of a checkout."""
        if not LAUNCHER.is_file():
            raise UserError(f"--slurm: {LAUNCHER} is not in {Path.cwd()}; start the study from the repository's root")
        self._options, self._record_path, self._looks = options, study_dir / RECORD, looks
        self._numbers = _read_record(self._record_path)
        self._missed: dict[str, int] = {}

    def submit(self, jobs: Sequence[Job], statuses: Mapping[str, Status]) -> dict[str, Status]:
        """Submit the waiting jobs that are not in the queue already. Returns the new status of all waiting ones.

        Raises UserError where Slurm refuses one; those before it stay submitted.
        """
        queue = _queue()
        if queue is None:
            raise UserError("--slurm: squeue does not answer; nothing was submitted")
        found: dict[str, Status] = {}
        anew: set[str] = set()
        for job in jobs:
            if statuses[job.name].state != "waiting":
                continue
            state = queue.get((self._numbers.get(job.name, ""), job.name))
            if state is not None and state not in _WORKS and anew.intersection(job.needs):
                _ask("scancel", self._numbers[job.name])  # it waits for a Slurm job that failed
                state = None
            if state is None:
                anew.add(job.name)
                after = [self._numbers[need] for need in job.needs if statuses[need].state != "done"]
                self._submit(job, after)
            found[job.name] = RUNNING if state in _WORKS else QUEUED
        return found

    def look(self, jobs: Sequence[Job], statuses: Mapping[str, Status]) -> dict[str, Status]:
        """The new status of the jobs that were queued or running. Empty where squeue does not answer."""
        queue = _queue()
        if queue is None:
            return {}
        found: dict[str, Status] = dict(statuses)
        for job in jobs:
            if found[job.name].state not in ("queued", "running"):
                continue
            state = queue.get((self._numbers[job.name], job.name))
            if state is not None:
                found[job.name] = RUNNING if state in _WORKS else QUEUED
            else:
                found[job.name] = self._gone(job, found)
        return found

    def _submit(self, job: Job, after: Sequence[str]) -> None:
        job.directory.mkdir(parents=True, exist_ok=True)
        job.outcome.unlink(missing_ok=True)
        script = job.directory / "job.sh"
        write_whole(script, batch_script(job, self._options).encode())
        command = ["sbatch", *sbatch_options(job, self._options, after), str(script)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"--slurm: sbatch of job {job.name}: {error}") from None
        number = ended.stdout.strip().partition(";")[0]
        if ended.returncode or not number.isdecimal():
            raise UserError(f"--slurm: sbatch refuses job {job.name}: {one_line(ended.stderr.strip() or ended.stdout.strip())}")
        self._numbers[job.name] = number
        write_whole(self._record_path, json.dumps(self._numbers, indent=1).encode(), durable=True)

    def _gone(self, job: Job, statuses: Mapping[str, Status]) -> Status:
        """The status of a job that is no longer in the queue."""
        outcome = read_outcome(job.outcome)
        if outcome is not None:
            error = last_error(job.log) if outcome.reason == SEE_LOG else None
            return status_after(outcome if error is None else replace(outcome, reason=error))
        lost = [need for need in job.needs if statuses[need].state in ("failed", "left", "not run")]
        if lost:  # Slurm has cancelled it
            return Status("not run", f"needs {', '.join(lost)}")
        self._missed[job.name] = self._missed.get(job.name, 0) + 1
        if self._missed[job.name] < self._looks:
            return statuses[job.name]
        facts = [fact for fact in (_state_of_past(self._numbers[job.name]), last_error(job.log)) if fact]
        return Status("failed", f"died as Slurm job {self._numbers[job.name]}: {', '.join(facts) or 'it left no log'}")


def sbatch_options(job: Job, options: SlurmOptions, after: Sequence[str]) -> list[str]:
    """The options of sbatch for a job. after: numbers of Slurm jobs that must succeed first. UserError for a layout on nodes. Pure."""
    ranks = max(1, job.ranks)
    nodes = -(-ranks // options.ranks_per_node)
    if ranks % nodes:
        raise UserError(f"job {job.name}: {ranks} ranks do not fill nodes of {options.ranks_per_node} (slurm: ranks_per_node)")
    words = [
        "--parsable", "--requeue", "--open-mode=append", "--signal=B:USR1@300", f"--job-name={job.name}", f"--output={job.log}",
        f"--nodes={nodes}", f"--ntasks-per-node={ranks // nodes}", f"--cpus-per-task={options.cpus_per_task}",
    ]  # fmt: skip
    if job.ranks and options.gpus_per_node is not None:
        kind = options.gpus_per_node.rpartition(":")[0]
        words.append(f"--gpus-per-node={kind}{':' if kind else ''}{ranks // nodes}")
        words += ["--mem=0"] if ranks // nodes == options.ranks_per_node else []  # a whole node
    words += [f"--{name}={value}" for name in ("partition", "account", "time") if (value := getattr(options, name)) is not None]
    words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return [*words, *options.sbatch_args]


def batch_script(job: Job, options: SlurmOptions) -> str:
    """The script of a job: examples/launch.sh with its command; when the script ends, the outcome is in the job's directory. Pure."""
    directory = shlex.quote(str(job.directory.absolute()))
    if job.trains:
        flags = job.command[job.command.index(TRAINER) + 1 :]
        work = f"train {shlex.join(_without_own_flags(flags, job.directory))}"
    else:
        work = f'OUTPUT={directory}\nrun_tool "$PYTHON" {shlex.join(job.command)}'
    device = "" if options.gpus_per_node is not None else "export DEVICE=cpu\n"
    return (
        "#!/usr/bin/env bash\n"
        f'# Job {job.name} of a study; written by salt-study --slurm.\ncd "$SLURM_SUBMIT_DIR" || exit 2\n{device}'
        f"RUN_DIR={directory}\nsource {LAUNCHER}\n"
        f'trap \'[ -z "${{outcome:-}}" ] || cp -f -- "$outcome" "$RUN_DIR/outcome.txt"\' EXIT\n'
        f"{work}\n"
    )


def _without_own_flags(flags: Sequence[str], save: Path) -> list[str]:
    """The flags without those that launch.sh adds: --save, --load of the same directory, --exit-signal-handler."""
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--exit-signal-handler":
            continue
        if name in ("--save", "--load"):
            value = value if equals else next(words, "")
            if name == "--load" and Path(value) != save:
                kept += [name, value]
            continue
        kept.append(word)
    return kept


def _read_record(path: Path) -> dict[str, str]:
    try:
        record = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict) or not all(isinstance(number, str) and number.isdecimal() for number in record.values()):
        raise UserError(
            f"{path} does not hold numbers of Slurm jobs; see squeue, and delete it where none of this study is there"
        )
    return record


def _queue() -> dict[tuple[str, str], str] | None:
    """{(number, name): state} of this user's jobs in the queue; None where squeue does not answer."""
    shown = _ask("squeue", "--noheader", "--me", "--format=%i|%j|%T")
    if shown is None:
        return None
    rows = [line.split("|") for line in shown.splitlines() if line.count("|") >= 2]
    return {(number.strip(), "|".join(name)): state.strip() for number, *name, state in rows}


def _state_of_past(number: str) -> str | None:
    """What accounting says of a job that is over, such as TIMEOUT; None where there is no accounting."""
    shown = _ask("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={number}")
    lines = (shown or "").split("\n")
    return f"Slurm says {lines[0].strip()}" if lines[0].strip() else None


def _ask(*command: str) -> str | None:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout if ended.returncode == 0 else None
