"""Saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import at_least, flag, representable
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept, where, and what a resumed run takes from it."""

    save: str | None = None
    """Directory for checkpoints."""

    load: str | None = None
    """Directory to resume from: its latest checkpoint, or one iter_* directory.
    A --load without a checkpoint starts afresh when it equals --save, and is refused otherwise."""

    save_interval: int | None = None
    """Steps between checkpoints; the last step is always saved."""

    save_at: tuple[int, ...] = ()
    """Steps whose checkpoint is kept for good, whatever --keep-last says, and loads under any layout: an early teacher to score data with, say."""

    keep_last: int | None = None
    """Keep this many routine checkpoints and delete older ones; default: keep all."""

    async_save: bool = False
    """Write checkpoints from a background process while training goes on."""

    take_over_save: bool = False
    """Take --save away from a run that seems to be writing there.
    That run sees it within ten seconds and ends after its step."""

    overwrite_save: bool = False
    """Start into a --save that holds checkpoints which this run does not go on from.
    It replaces those whose steps it reaches and becomes the latest; the others stay, for --keep-last deletes a run's own alone."""

    dist_ckpt_optim_fully_reshardable: bool = False
    """Write routine checkpoints' optimizer state so that it loads under any layout, as the save at the run's last step always is.
    Slower: every data-parallel rank gathers its group's state in host memory, 12 bytes a parameter of its tp and pp share."""

    load_fallback: bool = False
    """When the newest checkpoint is damaged, report it and resume from the one before."""

    finetune: bool = False
    """Take the weights alone from --load: step 0, fresh optimizer, data from the start."""

    new_data: bool = False
    """Resume on other data than the checkpoint's: optimizer and step stay, the new data starts at its beginning, and the change is recorded."""

    no_load_optim: bool = False
    """Resume without the optimizer's state; the schedule goes on at the checkpoint's step."""

    no_load_rng: bool = False
    """Resume without the random state."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What a failed save (a full disk, say) does to the run. The last good checkpoint stands either way."""

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
