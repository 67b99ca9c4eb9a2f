"""The sinks that a run's flags ask for: where their files lie, whether they can be opened, and the sinks themselves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_salt.config import LoggingConfig
from megatron_salt.metrics.retrying_sink import RetryingSink
from megatron_salt.metrics.sinks import (
    Jsonl,
    TensorBoard,
    Wandb,
    look_at_jsonl,
    make_directory,
    refuse_in_the_way,
    require_package,
)


def jsonl_path(logging: LoggingConfig, save: str | None) -> Path | None:
    """The JSONL file: --jsonl, or SAVE/train.jsonl; None: there is none."""
    return Path(logging.jsonl) if logging.jsonl else Path(save) / "train.jsonl" if save else None


def tensorboard_directory(logging: LoggingConfig, save: str | None) -> Path | None:
    """The directory of TensorBoard files and profiles: --tensorboard-dir, or SAVE/tensorboard; None: there is none."""
    return Path(logging.tensorboard_dir) if logging.tensorboard_dir else Path(save) / "tensorboard" if save else None


def require_packages(logging: LoggingConfig) -> None:
    """Raise UserError where a package that the flags need is missing. Every rank calls, so that all refuse together."""
    if logging.wandb_project is not None:
        require_package("wandb", Wandb.name)


def refuse_unusable(logging: LoggingConfig, save: str | None) -> None:
    """Raise UserError for everything that `open_sinks` would refuse. Nothing is written."""
    require_packages(logging)
    jsonl, directory = jsonl_path(logging, save), tensorboard_directory(logging, save)
    if directory is not None:
        refuse_in_the_way(directory, f"{TensorBoard.name} {directory}")
    if jsonl is not None:
        with suppress(OSError):  # the disk may recover; the sink reports it
            look_at_jsonl(jsonl)


def open_sinks(logging: LoggingConfig, save: str | None, start_step: int, config: Mapping[str, Any]) -> list[RetryingSink]:
    """The sinks of a run that continues after `start_step`. config: the whole configuration, for Weights & Biases. Raises UserError."""
    jsonl, directory, project = jsonl_path(logging, save), tensorboard_directory(logging, save), logging.wandb_project
    if directory is not None:
        with suppress(OSError):  # the sink reports it
            make_directory(directory, TensorBoard.name)  # a wrong path is refused before another sink begins a file
    sinks: list[RetryingSink] = []
    if jsonl is not None:
        sinks.append(RetryingSink(Jsonl.name, lambda step: Jsonl(jsonl, step), start_step, reopen=False))
    if directory is not None:
        sinks.append(RetryingSink(TensorBoard.name, lambda step: TensorBoard(directory, step), start_step, reopen=True))
    if project is not None:
        sinks.append(
            RetryingSink(Wandb.name, lambda _: Wandb(project, logging.wandb_exp_name, config), start_step, reopen=False)
        )
    return sinks
