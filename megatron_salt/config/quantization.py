"""FP8 and FP4 in the student's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import at_least, flag, representable
from megatron_salt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """FP8 and FP4 matrix products in the student's layers, by Transformer Engine.
    These flags have no effect without --fp8-format or --fp4-format."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply in FP8: e4m3 everywhere, or hybrid, which uses e5m2 for gradients.
    Needs --bf16 and --transformer-impl transformer_engine.
    Embedding, norms, attention, output head and loss do not change."""

    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None
    """How the scales of FP8 numbers are chosen.
    tensorwise: one for each tensor, from its current maximum. delayed: one for each tensor, from the maxima of earlier steps.
    blockwise: one for each block of 128 values. mxfp8: one for each block of 32 values.
    Default: mxfp8 on GPUs of compute capability 10, else tensorwise."""

    fp8_amax_history_len: int = 1
    """Number of earlier maxima that --fp8-recipe delayed keeps for each tensor."""

    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of the kept maxima --fp8-recipe delayed uses for the scale."""

    fp8_margin: int = 0
    """Powers of two that --fp8-recipe delayed leaves free above the maximum."""

    fp8_param_gather: bool = False
    """Keep the layers' weights in FP8 only, and gather them in FP8: half the memory and traffic of weights.
    The distributed optimizer keeps float32 main parameters."""

    first_last_layers_bf16: bool = False
    """Keep the first and last layers of the model in bfloat16.
    See --num-layers-at-start-in-bf16 and --num-layers-at-end-in-bf16."""

    num_layers_at_start_in_bf16: int = 1
    """Layers at the start that --first-last-layers-bf16 keeps in bfloat16."""

    num_layers_at_end_in_bf16: int = 1
    """Layers at the end that --first-last-layers-bf16 keeps in bfloat16."""

    fp4_format: Literal["e2m1"] | None = None
    """Multiply in FP4, instead of --fp8-format. Needs a GPU of compute capability 10 or higher."""

    fp4_recipe: Literal["nvfp4"] = "nvfp4"
    """How the scales of FP4 numbers are chosen."""

    def __post_init__(self) -> None:
        at_least(self, 1, "fp8_amax_history_len")
        at_least(self, 0, "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        representable(self)
        if self.fp8_format is not None and self.fp4_format is not None:
            raise UserError(
                f"--fp8-format {self.fp8_format} and --fp4-format {self.fp4_format} are two precisions of the same products; give one"
            )
        for name in ("fp8_recipe", "fp8_param_gather"):
            if getattr(self, name) and self.fp8_format is None:
                raise UserError(f"{flag(name)} needs --fp8-format")
        if self.first_last_layers_bf16 and self.fp8_format is None and self.fp4_format is None:
            raise UserError("--first-last-layers-bf16 needs --fp8-format or --fp4-format")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise UserError(
                "--first-last-layers-bf16 cannot be combined with --fp8-recipe delayed, whose maxima are reduced over ranks "
                "once for all layers"
            )
        if self.fp8_recipe != "delayed" and (
            self.fp8_amax_history_len != 1 or self.fp8_amax_compute_algo != "most_recent" or self.fp8_margin
        ):
            raise UserError(
                "--fp8-amax-history-len, --fp8-amax-compute-algo and --fp8-margin belong to --fp8-recipe delayed, "
                f"got --fp8-recipe {self.fp8_recipe}"
            )
