"""A piece of a study's work that one process tree does: a run of an arm, or what runs need before they start. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_salt.errors import UserError

TRAINER = "megatron_salt.pretrain"
FINETUNE = "--finetune"


@dataclass(frozen=True)
class CachedStage1:
    """A stage 1 with --teacher-cache."""

    order: tuple[str | int | None, ...]
    """Cache, teacher, selection, seed and batch size: runs with the same ones draw the same samples in the same order"""
    steps: int
    """Its steps: the samples that the run reads from the cache, or adds to it"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job. Whether it is done is read from `outcome`; a job that is done is not started again.

    The same command goes on where an earlier start stopped, or does the work again: --load of a run, --overwrite of a tool.
    """

    name: str
    """Unique in the study; also the name on Slurm"""
    kind: Literal["teacher", "score", "select", "grow", "run"]
    command: tuple[str, ...]
    """Program and arguments after the launcher, such as ("-m", "megatron_salt.pretrain", "--config", ...). Whoever starts a trainer adds
    --outcome-file; --save, --load and --exit-signal-handler stand here"""
    ranks: int
    """Processes, which torchrun starts where there are several; 0: a plain Python program without ranks"""
    directory: Path
    """Its own alone: its log and outcome file go there, whoever starts it makes it; --save of a run"""
    needs: tuple[str, ...]
    """Names of jobs that must be done first"""
    arm: str = ""
    """Name of a run's arm, with its settings, for the table; empty for the others"""
    seed: int | None = None
    """Seed of a run, for the table"""
    steps: int = 0
    """Optimizer steps of a training; 0: it trains nothing"""
    cached: CachedStage1 | None = None
    """None: no --teacher-cache"""

    @property
    def trains(self) -> bool:
        """Whether it is an ordinary training run, which writes its own outcome file."""
        return TRAINER in self.command

    @property
    def log(self) -> Path:
        """What its processes write to stdout and stderr; later starts are appended."""
        return self.directory / "log.txt"

    @property
    def outcome(self) -> Path:
        """One line that tells how its last start ended, see `jobs/outcome.py`. Absent while it works, and where it never began."""
        return self.directory / "outcome.txt"


def goes_on(command: Sequence[str]) -> tuple[str, ...]:
    """The command of a training that has a checkpoint of its own: without the flags of its first start, `--load DIR --finetune`."""
    return tuple(command[: command.index("--load")] if FINETUNE in command else command)


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """`slurm:` of STUDY.yaml: where a study's jobs run on Slurm."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """Time limit of a start, as sbatch takes it; a job that needs more is requeued"""
    gpus_per_node: str | None = "8"
    """As --gpus-per-node takes it: "8" or "h100:8"; None: the jobs run on CPUs"""
    ranks_per_node: int = 8
    """Ranks on one node: its GPUs"""
    cpus_per_task: int = 8
    sbatch_args: tuple[str, ...] = ()
    """Further options of sbatch for every job; they win over the fields above"""

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "cpus_per_task"):
            if getattr(self, name) < 1:
                raise UserError(f"slurm: {name} must be at least 1, got {getattr(self, name)}")
