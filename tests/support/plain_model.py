"""Oracle: the decoder in plain torch, from the formulas. It shares no code with megatron-core."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_salt.config import ModelConfig


def logits(model: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Logits [b, s, padded_vocabulary_size]. tokens, positions: int64 [b, s]. mask: bool [b, s, s], True where a query (row) sees a key."""
    hidden = norm(model, weights, "decoder.final_layernorm", streams(model, weights, tokens, positions, mask)[-1])
    head = "output_layer.weight" if model.untie_embeddings_and_output_weights else "embedding.word_embeddings.weight"
    return hidden @ weights[head].T


def streams(model: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor, positions: Tensor, mask: Tensor) -> list[Tensor]:
    """The residual stream [b, s, h] before the first layer and after each layer. Arguments as in `logits`."""
    hidden = weights["embedding.word_embeddings.weight"][tokens]
    if model.position_embedding_type == "learned_absolute":
        hidden = hidden + weights["embedding.position_embeddings.weight"][positions]
    found = [hidden]
    for layer in range(model.num_layers):
        own = {name.removeprefix(f"decoder.layers.{layer}."): value for name, value in weights.items()
               if name.startswith(f"decoder.layers.{layer}.")}  # fmt: skip
        with_attention = hidden + attention(model, own, norm(model, own, "input_layernorm", hidden), mask)
        before_mlp = hidden if model.parallel_residual else with_attention
        hidden = with_attention + mlp(model, own, norm(model, own, "pre_mlp_layernorm", before_mlp))
        found.append(hidden)
    return found


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(model: ModelConfig, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if model.normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if model.normalization == "LayerNorm" else x


def attention(model: ModelConfig, weights: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """Attention. The rows of the qkv weight are, for each group, its query heads, its key head and its value head."""
    batch, length, _ = x.shape
    groups, width = model.query_groups, model.head_width
    heads = model.num_attention_heads // groups
    qkv = linear(weights, "self_attention.linear_qkv", x).view(batch, length, groups, heads + 2, width)
    query, key, value = qkv[..., :heads, :], qkv[..., heads : heads + 1, :], qkv[..., heads + 1, :]
    if model.qk_layernorm:
        query, key = (
            norm(model, weights, "self_attention.q_layernorm", query),
            norm(model, weights, "self_attention.k_layernorm", key),
        )
    if model.position_embedding_type == "rope":
        query, key = rotate(model, query), rotate(model, key)
    scores = torch.einsum("bqghd,bkgd->bghqk", query, key[..., 0, :]) / width**0.5
    shares = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    return linear(weights, "self_attention.linear_proj", torch.einsum("bghqk,bkgd->bqghd", shares, value).flatten(2))


def rotate(model: ModelConfig, x: Tensor) -> Tensor:
    """Rotary embedding: the plane of channels i and i + r/2 of the first r is rotated by position * base^(-2i/r)."""
    r = int(model.head_width * model.rotary_percent)
    frequencies = torch.tensor([scaled(model, model.rotary_base ** (-channel / r)) for channel in range(0, r, 2)])
    angle = torch.arange(x.size(1))[:, None] * frequencies
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    first, second, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def scaled(model: ModelConfig, frequency: float) -> float:
    """A rotary frequency in radians a position, stretched for a longer context."""
    if model.rope_scaling == "llama3":
        waves = model.rope_scaling_original_context / (2 * math.pi / frequency)
        low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
        if waves > high:
            return frequency
        if waves >= low:
            kept = (waves - low) / (high - low)
            return (1 - kept) * frequency / model.rope_scaling_factor + kept * frequency
    return frequency if model.rope_scaling == "none" else frequency / model.rope_scaling_factor


def mlp(model: ModelConfig, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = linear(weights, "mlp.linear_fc1", x)
    if model.swiglu:
        gate, value = x.chunk(2, dim=-1)
        x = gate * torch.sigmoid(gate) * value
    elif model.squared_relu:
        x = x.clamp(min=0) ** 2
    elif model.relu:
        x = x.clamp(min=0)
    elif model.gelu_tanh:
        x = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    else:
        x = F.gelu(x)
    return linear(weights, "mlp.linear_fc2", x)
