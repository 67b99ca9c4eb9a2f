"""The modules that the layers of a model are built from: plain torch modules, or Transformer Engine's.

Both build megatron-core's TransformerLayer, with the same keys in a checkpoint. Transformer Engine keeps a norm inside the linear
layer after it; the torch layers save their norms under those keys. Transformer Engine is imported only when its layers are built.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor

from megatron_salt.config import ModelConfig
from megatron_salt.model.attention import CoreAttention
from megatron_salt.model.guidance.term import Guide, guided
from megatron_salt.model.precision import Precision
from megatron_salt.parallel.mcore_compat import mlp_of_layer

ForwardContext = Callable[[], AbstractContextManager]


def squared_relu(activations: Tensor) -> Tensor:
    """max(x, 0)^2. megatron-core's own function is compiled at its first call: a C++ compiler and half a minute on a CPU."""
    return F.relu(activations).square()


def gelu_tanh(activations: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(activations, approximate="tanh")


@dataclass(frozen=True)
class Activation:
    """The activation of an MLP, in megatron-core's terms."""

    function: Callable[[Tensor], Tensor]
    fused: bool
    """Whether it is compiled together with the bias before it."""


def activation_of(model: ModelConfig, compiled: bool) -> Activation:
    """The activation of a model's MLP. compiled: use megatron-core's compiled forms where there is one.

    megatron-core knows the compiled GELU by torch's function, but computes the approximation by tanh, and always adds a bias.
    """
    if model.swiglu:
        return Activation(F.silu, compiled)
    if model.squared_relu:
        return Activation(squared_relu, False)
    if model.relu:
        return Activation(F.relu, False)
    if not model.gelu_tanh:
        return Activation(F.gelu, False)
    fused = compiled and not model.disable_bias_linear
    return Activation(F.gelu if fused else gelu_tanh, fused)


class Layer(TransformerLayer):
    """megatron-core's layer, after which hidden-state guidance may stand.

    A block hands `attention_bias` to each of its layers as it is, also where it recomputes several at a time. No model here has a bias, so
    that argument carries the guidance of the microbatch.
    """

    def forward(
        self, hidden_states: Tensor, *others: Any, attention_bias: Guide | None = None, **named: Any
    ) -> tuple[Tensor, Any]:
        """[s, b, h] to [s, b, h]. The other arguments are those of megatron-core's TransformerLayer."""
        output, context = self.unguided(hidden_states, *others, **named)
        if attention_bias is None or attention_bias.target.layer != self.layer_number:
            return output, context
        return guided(output, attention_bias, self.config.sequence_parallel, self.tp_group), context

    def unguided(self, hidden_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Any]:
        """The layer itself."""
        return super().forward(hidden_states, *others, **named)


class ParallelResidualLayer(Layer):
    """A layer whose attention and MLP both read its input: x + attention(norm(x)) + mlp(other_norm(x)), as in GPT-NeoX."""

    def unguided(self, hidden_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Any]:
        """[s, b, h] to [s, b, h]. The arguments are those of megatron-core's TransformerLayer."""
        named.pop("dynamic_inference_decode_only", None)
        with_attention, context = self._forward_attention(hidden_states, *others, **named)
        mlp = self.mlp(self.pre_mlp_layernorm(hidden_states))
        with self.bias_dropout_add_exec_handler():
            output = self.mlp_bda(self.training, self.config.bias_dropout_fusion)(mlp, with_attention, self.hidden_dropout)
        return make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True), context


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with sequence parallelism: its weight is marked, so that megatron-core sums its gradient over tp."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with sequence parallelism, see RMSNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """The module classes that differ between the implementations."""

    norm_before: Any
    """Norm before attention and before the MLP."""
    norm: Any
    """Norm of queries and keys, and at the end of the model."""
    column: Any
    """Linear layer after `norm_before`, split over its outputs."""
    row: Any
    """Linear layer split over its inputs."""
    attention: Any
    saved_as: dict[str, str] = field(default_factory=dict)
    """{prefix of keys in a layer: their prefix in a checkpoint}, where the two differ."""


def torch_parts(config: TransformerConfig) -> LayerParts:
    """Plain torch modules and megatron-core's parallel linears."""
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    saved_as = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return LayerParts(
        norm_before=norm,
        norm=norm,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        attention=CoreAttention,
        saved_as=saved_as,
    )


def transformer_engine_parts(torch_attention: bool) -> LayerParts:
    """Transformer Engine's modules, as in megatron-core's `get_gpt_layer_with_transformer_engine_spec`."""
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return LayerParts(
        norm_before=IdentityOp,
        norm=TENorm,
        column=TELayerNormColumnParallelLinear,
        row=TERowParallelLinear,
        attention=CoreAttention if torch_attention else TEDotProductAttention,
    )


def block_spec(
    config: TransformerConfig, model: ModelConfig, precision: Precision, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """megatron-core's spec of the layers of one model chunk."""
    engine = precision.implementation == "transformer_engine"
    parts = transformer_engine_parts(precision.torch_attention) if engine else torch_parts(config)
    qk_norm = parts.norm if config.qk_layernorm else IdentityOp
    layer = ModuleSpec(
        module=ParallelResidualLayer if model.parallel_residual else Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm_before,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column,
                    core_attention=parts.attention,
                    linear_proj=parts.row,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm_before,
            mlp=mlp_of_layer(MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=parts.saved_as,
        ),
    )
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=parts.norm)


def fp8_products(precision: Precision, amax_group: ProcessGroup) -> ForwardContext:
    """Transformer Engine's context for FP8 products. Enter it for each forward pass.

    amax_group: the ranks over which a recipe reduces maxima. Without it Transformer Engine would take all ranks.
    """
    import transformer_engine.pytorch as te

    recipe = te_recipe(precision)
    return lambda: te.fp8_autocast(enabled=True, fp8_recipe=recipe, fp8_group=amax_group)


def te_recipe(precision: Precision) -> Any:
    """Transformer Engine's recipe object for a model that only runs forward."""
    from transformer_engine.common import recipe as recipes

    formats = {"e4m3": recipes.Format.E4M3, "hybrid": recipes.Format.HYBRID}
    kinds = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
    assert precision.forward_only and precision.fp8_format is not None, precision
    return vars(recipes)[kinds[precision.fp8_recipe]](fp8_format=formats[precision.fp8_format])
