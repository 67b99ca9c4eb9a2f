"""A piece of a study's work that one process tree does: a run of an arm, or what runs need before they start. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job. Whether it is done is read from its files; a job that is done is not started again."""

    name: str
    """Unique in the study; also the name on Slurm and of its log file"""
    kind: Literal["teacher", "score", "select", "grow", "run"]
    command: tuple[str, ...]
    """Program and arguments after the launcher, such as ("-m", "megatron_salt.pretrain", "--config", ...)"""
    ranks: int
    """Processes of torchrun; 0: a plain Python program without ranks"""
    directory: Path
    """Where its log and outcome file go; --save of a run"""
    needs: tuple[str, ...]
    """Names of jobs that must be done first"""
