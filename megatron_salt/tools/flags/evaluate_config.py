"""Flags of tools/evaluate.py. Docstrings of fields are their help texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import at_least
from megatron_salt.config.parallel import Device
from megatron_salt.data.order import SEEDS, is_seed
from megatron_salt.errors import UserError
from megatron_salt.evaluation.metrics import KNOWN, refuse_unknown


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate checkpoints on likelihood tasks."""

    load: tuple[str, ...]
    """Directories of checkpoints, of which the latest is used, or iter_* directories. Several give a table."""

    output: str
    """JSON file of the results; a Markdown table is written beside it. A start with the same flags adds what is missing."""

    tasks: tuple[str, ...] = ()
    """Task files: JSONL, see docs/tasks.md. A task is named after its file."""

    data: tuple[str, ...] = ()
    """NAME=PREFIX of .bin/.idx pairs, made with the checkpoints' tokenizer: loss, accuracy and bits per byte of all windows."""

    seq_length: int | None = None
    """Tokens of each window of --data, for all checkpoints. Default: what the model with the shortest context takes."""

    overwrite: bool = False
    """Replace an --output that holds other results."""

    metrics: tuple[str, ...] = KNOWN
    """Metrics of tasks in the table. The JSON always has all."""

    shots: int = 0
    """Solved examples before each context, separated by an empty line."""

    shot_file: tuple[str, ...] = ()
    """With --shots: a task file for each of --tasks. Its first examples are taken, without the one that is asked."""

    add_bos: Literal["auto", "yes", "no"] = "auto"
    """Whether every text begins with the beginning-of-sequence id. auto: where the tokenizer.json itself says so."""

    bootstrap_seed: int = 1234
    """Seed of the resampling behind standard errors."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages. The remaining ranks form data-parallel replicas."""

    batch_tokens: int = 8192
    """Tokens in one forward pass of a replica, padding included; at least one request."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format in which the models compute. Default: the one of each model's training."""

    exit_file: str | None = None
    """Leave when this file appears, as after SIGTERM and SIGUSR1. It is not deleted; a start is refused while it exists."""

    log_interval: int = 1000
    """Requests, or windows of --data, between lines of progress."""

    device: Device = "auto"
    """Where every rank computes, as in the training run: auto, cuda or cpu."""

    distributed_timeout_minutes: float = 10.0
    """Minutes after which a waiting collective fails."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_tokens", "log_interval", "seq_length")
        at_least(self, 0, "shots")
        if not self.load:
            raise UserError("--load names no checkpoint")
        if not (self.tasks or self.data):
            raise UserError("nothing is asked: give --tasks or --data")
        if self.seq_length is not None and not self.data:
            raise UserError(f"--seq-length {self.seq_length} needs --data: it is the length of its windows")
        if self.shot_file and not self.shots:
            raise UserError("--shot-file needs --shots: how many of its examples are shown")
        if not is_seed(self.bootstrap_seed):
            raise UserError(f"--bootstrap-seed must be {SEEDS}, got {self.bootstrap_seed}")
        if not self.distributed_timeout_minutes > 0:
            raise UserError(f"--distributed-timeout-minutes must be above 0, got {self.distributed_timeout_minutes}")
        refuse_unknown(self.metrics)
