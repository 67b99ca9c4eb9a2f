"""Running a model with FP8 or without, from the same weights; and a model that is only run forward with weights in FP8 alone.

`with in_bfloat16(model)` runs any model's layers in bfloat16. For a teacher, this may be relied on: a GPT whose `Precision` is
`forward_only` with an `fp8_format` is built and loaded with bfloat16 weights and runs its layers inside `GPT.forward_context()`, which
is `fp8_products` over a group of its own mesh; `in_bfloat16` runs them as a model without FP8 does, bit for bit. Then
`keep_fp8_alone(model)` gives the layers' linears FP8 weights, in the one orientation that a forward product reads, and frees the
bfloat16 ones. In all other models `forward_context` is `nullcontext`. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.fp8_utils import TE_LINEAR_TYPES, is_float8tensor

from megatron_salt.model.precision import Precision

if TYPE_CHECKING:
    from megatron_salt.model.gpt import GPT

ForwardContext = Callable[[], AbstractContextManager]


def fp8_products(precision: Precision, amax_group: ProcessGroup) -> ForwardContext:
    """Transformer Engine's context for a model's products, to be entered for each forward. amax_group: where a recipe reduces maxima
    over ranks; without one Transformer Engine would take the world."""
    import transformer_engine.pytorch as te

    recipe = te_recipe(precision)
    return lambda: te.fp8_autocast(enabled=True, fp8_recipe=recipe, fp8_group=amax_group)


def te_recipe(precision: Precision) -> Any:
    """Transformer Engine's recipe object of a model that is only run forward."""
    from transformer_engine.common import recipe as recipes

    formats = {"e4m3": recipes.Format.E4M3, "hybrid": recipes.Format.HYBRID}
    kinds = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
    assert precision.forward_only and precision.fp8_format is not None, precision
    return vars(recipes)[kinds[precision.fp8_recipe]](fp8_format=formats[precision.fp8_format])


@contextmanager
def in_bfloat16(model: GPT) -> Iterator[None]:
    """Run a model's layers without FP8 and FP4 while the block runs. A teacher's must still be there in bfloat16."""
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
    """Turn the weights of the layers' linears into FP8 and free their bfloat16 form, one after the other. No rank talks to another.

    What Transformer Engine does to a weight that is created under `quantized_model_init`, with the loaded values in place of initial
    ones. Its form for backward products, the transpose, is never made. Does nothing to a model without FP8.
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
            linear._fp8_workspaces.clear()  # FP8 copies that forwards have cached beside the bfloat16 weights
    model.fp8_alone = True


def linears(model: nn.Module) -> Iterator[Any]:
    """Transformer Engine's linears of a model, which are those that FP8 changes."""
    return (module for module in model.modules() if isinstance(module, TE_LINEAR_TYPES))


def raw_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a parameter's bytes: itself, or the data of one in FP8."""
    if not is_float8tensor(tensor):
        return [tensor]
    data: Any = tensor
    return [part for part in data.get_data_tensors() if part is not None]
