"""What a run reports, and where."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.config.checks import above_zero, at_least, representable


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports, and where."""

    log_interval: int = 1
    """Steps between log lines."""

    tensorboard_dir: str | None = None
    """Directory for TensorBoard. Default: SAVE/tensorboard."""

    jsonl: str | None = None
    """File that gets one JSON object for each step. Default: SAVE/train.jsonl."""

    heartbeat_file: str | None = None
    """For a launcher: a file that holds the current step. It changes at most every ten seconds while steps pass.
    If it stays the same for longer than any evaluation or save takes, the run hangs."""

    straggler_report_interval: int | None = None
    """Steps between reports of the slowest ranks, in computing and in reading data. Default: no reports."""

    device_peak_tflops: float | None = None
    """Peak of the device's matrix products in the run's precision (bf16 or float32, FP8 counts as twice), without sparsity.
    In 10^12 FLOP/s. The model FLOP/s utilization (MFU) in the log and what start-up says of the cost of stage 1 need it.
    Default: from a table of GPUs. A CPU is measured for the cost, and has no MFU."""

    device_peak_gb_per_s: float | None = None
    """Peak of the device's memory, in 10^9 bytes/s. Used and found like --device-peak-tflops."""

    wandb_project: str | None = None
    """Project of Weights & Biases. Needs the wandb package."""

    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases, any text. A resumed run with the same name continues it."""

    def __post_init__(self) -> None:
        at_least(self, 1, "log_interval", "straggler_report_interval")
        above_zero(self, "device_peak_tflops", "device_peak_gb_per_s")
        representable(self)
