"""Length, batch, precision and ends of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import at_least, representable
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class TrainingConfig:
    """How long, on how much at a time, in which precision."""

    seq_length: int = 1024
    """Tokens of one sample."""

    micro_batch_size: int = 1
    """Samples of one forward pass on one replica."""

    global_batch_size: int | None = None
    """Samples of one step over all replicas; default: one microbatch a replica."""

    train_iters: int | None = None
    """Steps of the run."""

    train_samples: int | None = None
    """Samples of the run, instead of --train-iters; must be a multiple of --global-batch-size."""

    seed: int = 1234
    """Seeds initial weights, dropout and the order of samples."""

    bf16: bool = False
    """Train in bfloat16, with float32 main parameters and gradient reduction; default: float32."""

    transformer_impl: Literal["torch", "transformer_engine"] | None = None
    """Implementation of the student's and the teacher's layers: plain torch modules with scaled-dot-product attention, or Transformer Engine's.
    Default: transformer_engine with --bf16 on a GPU where it is installed, else torch.
    Checkpoints interchange."""

    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time in the output head; default: what fits --loss-chunk-mib."""

    loss_chunk_mib: int = 256
    """Memory budget from which --loss-chunk-tokens is derived."""

    eval_interval: int = 1000
    """Steps between evaluations on held-out data."""

    eval_iters: int = 0
    """Global batches of one evaluation; 0 turns evaluation off."""

    skip_samples: tuple[str, ...] = ()
    """Ranges A:B of consumed samples to jump over, such as 51200:56320 after a loss spike.
    Pure: the same flags give the same order."""

    exit_interval: int | None = None
    """Save and leave when the step is a multiple of this."""

    exit_duration_in_mins: float | None = None
    """Save and leave after this many minutes."""

    exit_signal_handler: bool = False
    """Save and leave when SIGTERM or SIGUSR1 arrives."""

    exit_file: str | None = None
    """Save and leave when this file appears, from whatever hand. It is not deleted, and a start that finds it is refused."""

    outcome_file: str | None = None
    """For a launcher: file that gets one line when the run ends, "done", "left" (it saved and wants to go on), "refused" (a mistake that another start would repeat), "unsaved" (the last checkpoint is not on disk) or "nonfinite", the step, the Slurm job (- without one) and its restart, and the reason.
    None appears where the run died."""

    max_nonfinite_steps: int = 10
    """So many steps in a row with a non-finite gradient norm end the run.
    Each such step leaves parameters and optimizer untouched."""

    manual_gc: bool = False
    """Collect Python garbage at the same step on every rank instead of whenever Python likes."""

    manual_gc_interval: int = 100
    """Steps between collections under --manual-gc; 0: never."""

    profile: bool = False
    """Write a torch profiler trace of --profile-step-start to --profile-step-end to --tensorboard-dir."""

    profile_step_start: int = 10
    """First profiled step."""

    profile_step_end: int = 12
    """First step that is no longer profiled."""

    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that profile."""

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "seq_length",
            "micro_batch_size",
            "global_batch_size",
            "train_iters",
            "train_samples",
            "loss_chunk_tokens",
            "loss_chunk_mib",
            "eval_interval",
            "exit_interval",
            "max_nonfinite_steps",
        )
        at_least(self, 0, "eval_iters", "manual_gc_interval", "profile_step_start", "exit_duration_in_mins", "seed")
        representable(self)
        if self.train_iters is not None and self.train_samples is not None:
            raise UserError(
                f"--train-iters {self.train_iters} and --train-samples {self.train_samples} are two lengths of one run; give one"
            )
        if self.profile and self.profile_step_end <= self.profile_step_start:
            raise UserError(
                f"--profile-step-end {self.profile_step_end} must be after --profile-step-start {self.profile_step_start}"
            )
        if any(rank < 0 for rank in self.profile_ranks):
            raise UserError(f"--profile-ranks must be at least 0, got {' '.join(map(str, self.profile_ranks))}")
