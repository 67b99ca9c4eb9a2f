"""The implementation of one model's layers and the number format of their products: an argument of `transformer_config` and `GPT`.

The student uses megatron-core's FP8: its transformer block enters Transformer Engine's context over the amax group of `parallel_state`.
The teacher cannot: `parallel_state` does not know its mesh. So its TransformerConfig says bfloat16, and `GPT.forward` enters the
context itself (see `fp8_teacher.py`). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config import QuantizationConfig, SaltConfig
from megatron_salt.parallel.hardware import Capability

Fp8Format = Literal["e4m3", "hybrid"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
Implementation = Literal["torch", "transformer_engine"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Layers and number formats of one model. Default: plain torch layers in the model's dtype."""

    implementation: Implementation = "torch"
    """Implementation of linear layers and norms, and of attention unless `document_masks`."""

    fp8_format: Fp8Format | None = None
    """None: no FP8."""

    fp8_recipe: Fp8Recipe = "tensorwise"
    amax_history_len: int = 1
    amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    margin: int = 0

    fp8_params: bool = False
    """Weights are created in FP8, and the model has no other copy of them."""

    bf16_layers: tuple[int, int] = (0, 0)
    """Number of layers at the start and at the end of the model that stay in bfloat16."""

    fp4_format: Literal["e2m1"] | None = None
    """None: no FP4."""

    fp4_recipe: Literal["nvfp4"] = "nvfp4"

    forward_only: bool = False
    """True for a teacher: `GPT.forward` enters the context for FP8 products, over a group of its own mesh."""

    document_masks: bool = False
    """Attention is torch's with either implementation: Transformer Engine's fast kernels take no document masks."""

    @property
    def quantized(self) -> bool:
        """Whether products use fewer than 16 bits."""
        return self.fp8_format is not None or self.fp4_format is not None

    @property
    def torch_attention(self) -> bool:
        """Whether attention is torch's, which takes masks."""
        return self.implementation == "torch" or self.document_masks

    def __str__(self) -> str:
        parts: list[str] = [self.implementation]
        if self.fp8_format is not None:
            parts.append(f"FP8 {self.fp8_format} {self.fp8_recipe}" + (", weights in FP8 alone" if self.fp8_params else ""))
        if self.fp4_format is not None:
            parts.append(f"FP4 {self.fp4_format} {self.fp4_recipe}")
        if self.quantized and any(self.bf16_layers):
            parts.append(f"the first {self.bf16_layers[0]} and last {self.bf16_layers[1]} layers in bfloat16")
        return ", ".join(parts)


TORCH = Precision()
"""Plain torch layers."""


def default_recipe(capability: Capability | None) -> Fp8Recipe:
    """mxfp8 if Transformer Engine has it for all products (compute capability 10.x, 11.x), else tensorwise."""
    return "mxfp8" if capability is not None and (10, 0) <= capability < (12, 0) else "tensorwise"


def student_precision(
    quantization: QuantizationConfig, implementation: Implementation, capability: Capability | None,
    document_masks: bool,
) -> Precision:  # fmt: skip
    """The student's precision according to its flags. capability: compute capability of the GPU; None without a GPU."""
    first_last = (quantization.num_layers_at_start_in_bf16, quantization.num_layers_at_end_in_bf16)
    return Precision(
        implementation=implementation,
        fp8_format=quantization.fp8_format,
        fp8_recipe=quantization.fp8_recipe or default_recipe(capability),
        amax_history_len=quantization.fp8_amax_history_len,
        amax_compute_algo=quantization.fp8_amax_compute_algo,
        margin=quantization.fp8_margin,
        fp8_params=quantization.fp8_param_gather,
        bf16_layers=first_last if quantization.first_last_layers_bf16 else (0, 0),
        fp4_format=quantization.fp4_format,
        fp4_recipe=quantization.fp4_recipe,
        document_masks=document_masks,
    )


def teacher_precision(
    salt: SaltConfig, implementation: Implementation, capability: Capability | None, document_masks: bool
) -> Precision:
    """The teacher's precision according to its flags. Weights are loaded in bfloat16; `fp8_teacher.keep_fp8_alone` drops that copy."""
    return Precision(
        implementation=implementation,
        fp8_format=salt.teacher_fp8_format,
        fp8_recipe=salt.teacher_fp8_recipe or default_recipe(capability),
        forward_only=True,
        document_masks=document_masks,
    )
