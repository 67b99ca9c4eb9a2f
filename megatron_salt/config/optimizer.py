"""AdamW and its schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import above_zero, at_least, flag, from_zero_to_below_one, representable, within
from megatron_salt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and gradient clipping, as in Megatron-LM."""

    lr: float = 3e-4
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the learning rate after the warm-up."""

    lr_decay_iters: int | None = None
    """Step at which --min-lr is reached. Default: the last step."""

    lr_decay_samples: int | None = None
    """The same in samples, for a run with --train-samples."""

    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""

    lr_warmup_samples: int = 0
    """The same in samples."""

    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the length of the decay, instead of a number of steps."""

    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of WSD's final decay."""

    lr_wsd_decay_iters: int | None = None
    """Steps of WSD's final decay."""

    lr_wsd_decay_samples: int | None = None
    """The same in samples."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices. Biases and norms have none."""

    start_weight_decay: float | None = None
    """Weight decay at the start, for a --weight-decay-incr-style that is not constant. Default: --weight-decay."""

    end_weight_decay: float | None = None
    """Weight decay at the end, for a --weight-decay-incr-style that is not constant. Default: --weight-decay."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay changes from start to end."""

    adam_beta1: float = 0.9
    """Decay rate of the average of gradients."""

    adam_beta2: float = 0.999
    """Decay rate of the average of squared gradients."""

    adam_eps: float = 1e-8
    """Added to the square root of the average of squared gradients."""

    clip_grad: float = 1.0
    """Scale gradients down to this global norm when theirs is larger. 0: no clipping."""

    override_opt_param_scheduler: bool = False
    """On resume, take the schedule from the flags and not from the checkpoint."""

    use_checkpoint_opt_param_scheduler: bool = False
    """On resume, take the schedule from the checkpoint, even where the flags differ."""

    def __post_init__(self) -> None:
        at_least(
            self,
            0,
            "lr",
            "min_lr",
            "lr_warmup_iters",
            "lr_warmup_samples",
            "lr_warmup_init",
            "weight_decay",
            "start_weight_decay",
            "end_weight_decay",
            "clip_grad",
        )
        above_zero(self, "adam_eps")
        at_least(self, 1, "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
        from_zero_to_below_one(self, "adam_beta1", "adam_beta2")
        within(self, 0.0, 1.0, "lr_warmup_fraction", "adam_eps")
        representable(self)
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if self.lr_warmup_init > self.lr:
            raise UserError(f"--lr-warmup-init {self.lr_warmup_init} is above --lr {self.lr}")
        for name in ("weight_decay", "start_weight_decay", "end_weight_decay"):
            if self.lr * (getattr(self, name) or 0.0) >= 1.0:
                raise UserError(
                    f"--lr {self.lr} x {flag(name)} {getattr(self, name)} must be below 1, the share that a step takes from a weight"
                )
        if self.lr_warmup_fraction is not None and (self.lr_warmup_iters or self.lr_warmup_samples):
            raise UserError(
                f"--lr-warmup-fraction {self.lr_warmup_fraction} and --lr-warmup-iters {self.lr_warmup_iters} / "
                f"--lr-warmup-samples {self.lr_warmup_samples} are two lengths of one warm-up; give one"
            )
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None and self.lr_wsd_decay_samples is None:
            raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters (or --lr-wsd-decay-samples)")
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise UserError(
                "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other; give one"
            )
