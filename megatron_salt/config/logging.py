"""What a run reports, and where to."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.config.checks import at_least, representable


@dataclass(frozen=True)
class LoggingConfig:
    """What a run says about itself."""

    log_interval: int = 1
    """Steps between log lines."""

    tensorboard_dir: str | None = None
    """TensorBoard directory; default: SAVE/tensorboard."""

    jsonl: str | None = None
    """File that gets one JSON object a step; default: SAVE/train.jsonl."""

    heartbeat_file: str | None = None
    """For a launcher: file that holds the present step and changes, at most every ten seconds, while steps go by.
    One that stands still longer than any evaluation or save takes means that the run hangs."""

    straggler_report_interval: int | None = None
    """Steps between reports of the rank that calculates, and the one that reads its data, more slowly than the others.
    Default: none."""

    wandb_project: str | None = None
    """Weights & Biases project (needs the wandb package)."""

    wandb_exp_name: str | None = None
    """Weights & Biases run name, any text. A resumed run of the same name continues it."""

    def __post_init__(self) -> None:
        at_least(self, 1, "log_interval", "straggler_report_interval")
        representable(self)
