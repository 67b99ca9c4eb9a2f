"""FP8 in a model that only runs forward, and a switch to bfloat16 for any model. Nothing in this module communicates.

Contract for teachers (a `Precision` that is `forward_only` and has an `fp8_format`):
- The GPT is built and loaded with bfloat16 weights.
- `GPT.forward` runs the layers inside `forward_context()`, which is `layers.fp8_products` over a group of the teacher's mesh. Inside
  `in_bfloat16(model)` it runs them exactly, bit for bit, as a model without FP8. Other models have `nullcontext`.
- `keep_fp8_alone(model)` replaces the weights of the layers' linears by FP8 ones, in the one orientation that a forward product
  reads, and frees the bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.fp8_utils import TE_LINEAR_TYPES, is_float8tensor

from megatron_salt.model.gpt import GPT
from megatron_salt.model.layers import te_recipe


@contextmanager
def in_bfloat16(model: GPT) -> Iterator[None]:
    """Run the layers of a model without FP8 and FP4 inside the block. A teacher must still have its bfloat16 weights."""
    assert not model.fp8_alone, "the bfloat16 weights have been dropped"
    config, context = model.config, model.forward_context
    formats = config.fp8, config.fp4
    config.fp8 = config.fp4 = None
    model.forward_context = nullcontext
    try:
        yield
    finally:
        config.fp8, config.fp4 = formats
        model.forward_context = context


@torch.no_grad()
def keep_fp8_alone(model: GPT) -> None:
    """Convert the weights of the layers' linears to FP8 and free their bfloat16 copies, one linear at a time. Not collective.

    The result is what Transformer Engine makes under `quantized_model_init`, with the loaded values instead of initial ones. The
    transpose, which backward products need, is never made. A model without FP8 does not change.
    """
    precision = model.precision
    if precision.fp8_format is None or model.fp8_alone:
        return
    assert precision.forward_only, "the student's weights are the optimizer's"
    import transformer_engine.pytorch as te

    with te.fp8_model_init(enabled=True, recipe=te_recipe(precision)):
        for linear in linears(model):
            linear.primary_weights_in_fp8 = True
            linear.init_fp8_metadata()
            quantizer = linear.quantizers["scaling_fwd"][linear.param_init_meta["weight"].fp8_meta_index]
            quantizer.set_usage(rowwise=True, columnwise=False)
            quantizer.internal = False
            linear.weight = nn.Parameter(quantizer(linear.weight), requires_grad=False)
            linear._fp8_workspaces.clear()  # FP8 copies that forward passes have cached beside the bfloat16 weights
    model.fp8_alone = True


def linears(model: nn.Module) -> Iterator[Any]:
    """The linears of a model that FP8 changes: Transformer Engine's."""
    return (module for module in model.modules() if isinstance(module, TE_LINEAR_TYPES))


def raw_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold the bytes of a parameter: the parameter itself, or the data of an FP8 parameter."""
    if not is_float8tensor(tensor):
        return [tensor]
    data: Any = tensor
    return [part for part in data.get_data_tensors() if part is not None]
