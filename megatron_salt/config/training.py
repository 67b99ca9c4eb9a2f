"""Length, batch size, implementation and end of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import at_least, representable
from megatron_salt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch size, implementation and end of a run."""

    seq_length: int = 1024
    """Tokens of one sample."""

    micro_batch_size: int = 1
    """Samples in one forward pass of one replica."""

    global_batch_size: int | None = None
    """Samples in one step, over all replicas. Default: one microbatch for each replica."""

    train_iters: int | None = None
    """Number of steps of the run."""

    train_samples: int | None = None
    """Number of samples of the run, instead of --train-iters. Must be a multiple of --global-batch-size."""

    seed: int = 1234
    """Seed of initial weights, dropout and the order of samples."""

    deterministic: bool = False
    """On GPUs, take operations that give the same bits each time, so that a repeated or resumed run gives the same losses. Slower.
    Changes nothing on a CPU, where every operation is deterministic."""

    bf16: bool = False
    """Train in bfloat16. Main parameters and gradient reduction stay float32. Default: float32."""

    transformer_impl: Literal["torch", "transformer_engine"] | None = None
    """Implementation of the layers of student and teacher.
    torch: plain torch modules with scaled-dot-product attention. transformer_engine: Transformer Engine's modules.
    Default: transformer_engine with --bf16 on a GPU where it is installed, else torch.
    Checkpoints load with either."""

    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time in the output head. Default: as many as fit --loss-chunk-mib."""

    loss_chunk_mib: int | None = None
    """MiB of memory for logits in the output head, the student's and a teacher's. It sets the default of --loss-chunk-tokens.
    Default on a CPU: 256. On a GPU: so many that the weight gradient's memory traffic takes under 5% of the head's time,
    5888 tokens in bfloat16, 2048 in float32."""

    eval_interval: int = 1000
    """Steps between evaluations on held-out data."""

    eval_iters: int = 0
    """Global batches in one evaluation; of a named set, at most as many as it has. 0: no evaluation."""

    eval_at_start: bool = True
    """Evaluate before the first step too, in a run from step 0."""

    eval_tasks: tuple[str, ...] = ()
    """Task files, JSONL as docs/tasks.md describes them, on which the student is evaluated in training."""

    eval_tasks_interval: int | None = None
    """Steps between evaluations on --eval-tasks; they come at the end and with --eval-at-start too. Default: --eval-interval."""

    eval_tasks_shots: int = 0
    """Solved examples before each context of --eval-tasks, separated by an empty line."""

    eval_tasks_shot_file: tuple[str, ...] = ()
    """With --eval-tasks-shots: a task file for each of --eval-tasks. Its first examples are taken, without the one that is asked."""

    skip_samples: tuple[str, ...] = ()
    """Skip these ranges A:B of consumed samples, such as 51200:56320 after a loss spike.
    The same flags always give the same order of samples."""

    exit_interval: int | None = None
    """Save and exit at a step that is a multiple of this."""

    exit_duration_in_mins: float | None = None
    """Save and exit after this many minutes."""

    exit_signal_handler: bool = False
    """Save and exit when SIGTERM or SIGUSR1 arrives."""

    exit_file: str | None = None
    """Save and exit when this file appears; anybody may create it.
    The run does not delete it, and refuses to start while it exists."""

    outcome_file: str | None = None
    """For a launcher: a file that gets one line when the run ends. It does not appear when the run dies.
    The line has a word, the step, the Slurm job (- without one), the job's restart count, and the reason.
    done: the run is complete. left: it saved, and another start goes on. refused: another start would repeat the error.
    unsaved: the last checkpoint is not on disk. nonfinite: loss or parameters are not finite.
    machine: a host cannot be used; its name stands in the place of the step."""

    max_nonfinite_steps: int = 10
    """End the run after this many steps in a row with a non-finite gradient norm.
    Such a step changes neither parameters nor optimizer."""

    manual_gc: bool = False
    """Collect Python's garbage at the same step on every rank, instead of whenever Python decides."""

    manual_gc_interval: int = 100
    """Steps between collections under --manual-gc. 0: never."""

    profile: bool = False
    """Write a torch profiler trace of steps --profile-step-start to --profile-step-end into --tensorboard-dir."""

    profile_step_start: int = 10
    """First profiled step."""

    profile_step_end: int = 12
    """First step that is not profiled any more."""

    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that write a trace."""

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
            "eval_tasks_interval",
            "exit_interval",
            "max_nonfinite_steps",
        )
        at_least(
            self,
            0,
            "eval_iters",
            "eval_tasks_shots",
            "manual_gc_interval",
            "profile_step_start",
            "exit_duration_in_mins",
            "seed",
        )
        representable(self)
        if self.train_iters is not None and self.train_samples is not None:
            raise UserError(
                f"--train-iters {self.train_iters} and --train-samples {self.train_samples} are two lengths of one run; give one"
            )
        if self.eval_tasks_interval is not None and not self.eval_tasks:
            raise UserError(f"--eval-tasks-interval {self.eval_tasks_interval} needs --eval-tasks: the task files")
        if self.eval_tasks_shots and not self.eval_tasks:
            raise UserError(f"--eval-tasks-shots {self.eval_tasks_shots} needs --eval-tasks: the task files")
        if self.eval_tasks_shot_file and not self.eval_tasks_shots:
            raise UserError("--eval-tasks-shot-file needs --eval-tasks-shots: how many of its examples are shown")
        if self.profile and self.profile_step_end <= self.profile_step_start:
            raise UserError(
                f"--profile-step-end {self.profile_step_end} must be after --profile-step-start {self.profile_step_start}"
            )
        if any(rank < 0 for rank in self.profile_ranks):
            raise UserError(f"--profile-ranks must be at least 0, got {' '.join(map(str, self.profile_ranks))}")
