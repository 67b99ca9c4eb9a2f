"""FP8 and FP4 of the student's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import at_least, flag, representable
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class QuantizationConfig:
    """Matrix products of the student's layers in 8 or 4 bits, by Transformer Engine.
    Nothing of it without --fp8-format or --fp4-format."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply in FP8: e4m3 throughout, or hybrid, which has e5m2 for gradients.
    Needs --bf16 and --transformer-impl transformer_engine.
    Embedding, norms, attention, output head and loss stay as they are."""

    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None
    """How scales are chosen: one a tensor from its present maximum (tensorwise) or from those of earlier steps (delayed), or one for each block of 128 (blockwise) or 32 (mxfp8) values.
    Default: mxfp8 on GPUs of compute capability 10, else tensorwise."""

    fp8_amax_history_len: int = 1
    """Maxima that --fp8-recipe delayed remembers of each tensor."""

    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of the remembered maxima --fp8-recipe delayed scales by."""

    fp8_margin: int = 0
    """--fp8-recipe delayed leaves this many powers of two of room above the maximum."""

    fp8_param_gather: bool = False
    """Keep the layers' weights in FP8 alone (main parameters stay float32 in the distributed optimizer) and gather them so: half the weights' memory and traffic."""

    first_last_layers_bf16: bool = False
    """Leave the first --num-layers-at-start-in-bf16 and the last --num-layers-at-end-in-bf16 layers of the model out of FP8 and FP4."""

    num_layers_at_start_in_bf16: int = 1
    """Layers at the start that --first-last-layers-bf16 leaves in bfloat16."""

    num_layers_at_end_in_bf16: int = 1
    """Layers at the end that --first-last-layers-bf16 leaves in bfloat16."""

    fp4_format: Literal["e2m1"] | None = None
    """Multiply in FP4, which takes the place of --fp8-format. For GPUs of compute capability 10 and above."""

    fp4_recipe: Literal["nvfp4"] = "nvfp4"
    """How FP4's scales are chosen."""

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
                "--first-last-layers-bf16 cannot be combined with --fp8-recipe delayed, whose maxima are reduced over ranks once for all layers"
            )
        if self.fp8_recipe != "delayed" and (
            self.fp8_amax_history_len != 1 or self.fp8_amax_compute_algo != "most_recent" or self.fp8_margin
        ):
            raise UserError(
                "--fp8-amax-history-len, --fp8-amax-compute-algo and --fp8-margin belong to --fp8-recipe delayed, "
                f"got --fp8-recipe {self.fp8_recipe}"
            )
