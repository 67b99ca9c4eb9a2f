"""Saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import at_least, flag, representable
from megatron_salt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints are kept, where, and what a resumed run takes from one."""

    save: str | None = None
    """Directory for checkpoints."""

    load: str | None = None
    """Directory of the checkpoint to resume from: its latest checkpoint, or one iter_* directory.
    Without a checkpoint in it the run starts at step 0 if --load equals --save, and is refused otherwise."""

    save_interval: int | None = None
    """Steps between checkpoints. The last step is always saved."""

    save_at: tuple[int, ...] = ()
    """Steps whose checkpoint is kept for ever, whatever --keep-last is, and loads with any layout.
    For example, an early teacher that scores data."""

    keep_last: int | None = None
    """Keep this many routine checkpoints and delete older ones. Default: keep all."""

    async_save: bool = False
    """Write checkpoints in a background process while training continues."""

    take_over_save: bool = False
    """Take --save away from another run that seems to write there.
    That run notices within ten seconds and exits after its step."""

    overwrite_save: bool = False
    """Start with a --save that holds checkpoints of another run.
    Checkpoints of equal steps are replaced, and this run's become the latest.
    All other checkpoints stay: --keep-last deletes only those of its own run."""

    dist_ckpt_optim_fully_reshardable: bool = False
    """Write the optimizer state of routine checkpoints so that it loads with any layout, as at the last step.
    Slower: each data-parallel rank gathers the state of its group in host memory.
    That takes 12 bytes for each parameter of its tp and pp share."""

    load_fallback: bool = False
    """When the newest checkpoint is damaged, report it and resume from the one before."""

    finetune: bool = False
    """Take only the weights from --load: step 0, a new optimizer, data from the start."""

    new_data: bool = False
    """Resume with other data than the checkpoint's. Optimizer and step stay; the data starts at its beginning.
    The checkpoint records the change."""

    no_load_optim: bool = False
    """Resume without the optimizer state. The schedule continues at the checkpoint's step."""

    no_load_rng: bool = False
    """Resume without the state of random generators."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """Whether a failed save, for example on a full disk, ends the run.
    The last good checkpoint stays in both cases."""

    def __post_init__(self) -> None:
        at_least(self, 1, "save_interval", "keep_last")
        representable(self)
        if self.save_interval is not None and self.save is None:
            raise UserError(f"--save-interval {self.save_interval} needs --save")
        for name in ("take_over_save", "overwrite_save"):
            if getattr(self, name) and self.save is None:
                raise UserError(f"{flag(name)} needs --save")
        if self.save_at and self.save is None:
            raise UserError(f"--save-at {' '.join(map(str, self.save_at))} needs --save")
        if any(step < 1 for step in self.save_at):
            raise UserError(f"--save-at must be at least 1, got {' '.join(map(str, self.save_at))}")
        if self.load is None:
            for name in ("finetune", "new_data", "no_load_optim", "no_load_rng", "load_fallback"):
                if getattr(self, name):
                    raise UserError(f"{flag(name)} needs --load")
        if self.finetune and self.new_data:
            raise UserError("--finetune starts at step 0 and --new-data keeps the step; give one")
