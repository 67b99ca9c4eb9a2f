"""What a GPU does in other steps than a CPU, for a trace on fake tensors: the same shapes are allocated, nothing is computed.

For a child process alone: functions of this package are replaced. docs/planner.md lists each with its bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model import gpt, layers, matrix_products
from megatron_salt.model.attention import CoreAttention
from megatron_salt.model.kernels import passes
from megatron_salt.model.precision import Precision
from megatron_salt.salt import load_teacher


class _Norm(torch.autograd.Function):
    """torch's fused RMSNorm and Transformer Engine's: the input stays for the backward pass, and 1 / rms of each row in float32."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight, values.new_empty(values.shape[:-1], dtype=torch.float32))
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        values, weight, _ = ctx.saved_tensors
        return torch.empty_like(values), torch.empty_like(weight)


def _norm(module: layers.RMSNorm, values: Tensor) -> Tensor:
    return _Norm.apply(values, module.weight)


def _into_out(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """A product that is written where it is asked for, without a copy of an operand."""
    return out


def _nothing(*_: object, **__: object) -> None:
    """A kernel that writes into tensors that are there."""


def _ring_attention(
    module: CoreAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
) -> Tensor:
    """Transformer Engine's attention: this rank's queries, keys and values stay, the result, and log-sum-exp of each query and head."""
    context = module._attend(query, key, value, None, 0.0)
    return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def _with_fused_activation(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, precision: Precision
) -> TransformerConfig:
    """`transformer_config` with the activation that goes with Transformer Engine's layers. It keeps its input alone."""
    config = _transformer_config(model, parallel, dtype, precision)
    activation = layers.activation_of(model, compiled=True)
    config.activation_func, config.bias_activation_fusion = activation.function, activation.fused
    return config


_transformer_config = gpt.transformer_config


@contextlib.contextmanager
def gpu_forms(precision: Precision) -> Iterator[None]:
    """Inside the block the head, norms and attention allocate what they do on a GPU. precision: of the model that is traced."""
    kernels = SimpleNamespace(row_sums=_nothing, into_gradient=_nothing, count_above=_nothing)
    forms: list[tuple[Any, str, Any]] = [
        (matrix_products, "logits", _into_out),
        (matrix_products, "hidden_gradient", _into_out),
        (matrix_products, "add_weight_gradient", _nothing),
        (passes, "kernels_for", lambda device: kernels),
        (layers.RMSNorm, "forward", _norm),
    ]
    if precision.implementation == "transformer_engine":
        forms += [(owner, "transformer_config", _with_fused_activation) for owner in (gpt, load_teacher)]
    if not precision.torch_attention:
        forms += [(CoreAttention, "forward", _ring_attention), (gpt.GPT, "attention_mask", lambda *_: None)]
    with contextlib.ExitStack() as stack:
        for owner, name, form in forms:
            stack.enter_context(mock.patch.object(owner, name, form))
        yield
