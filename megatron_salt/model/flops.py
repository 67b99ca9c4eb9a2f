"""Arithmetic of a model, counted as Megatron-LM counts it: matrix multiplications alone, a multiply-add as two. Pure.

All figures are FLOPs of one token's forward pass where nothing else is said; backward takes twice as many. Parameters are counted too.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.config import ModelConfig


@dataclass(frozen=True)
class HeadCost:
    """Elementwise work of the head, forward and backward, in FLOPs a logit."""

    plain: float
    """Against the data alone."""

    distilled: float
    """Against the data and a teacher, whose logits are work too."""


def core_attention_flops(model: ModelConfig, seq_length: int) -> float:
    """One layer's scores and weighted sums over half the sequence, as causal masks leave it: 2 * 2 d H s/2 (H heads of width d)."""
    return 2.0 * 2 * model.head_width * model.num_attention_heads * seq_length / 2


def layer_flops(model: ModelConfig, seq_length: int) -> float:
    """One layer with h hidden, H heads and G groups of width d, f MLP, s sequence:
    2 * (h d (H + 2G) + d H h + 2 d H s/2 + (3 if gated else 2) h f)."""
    hidden, width, heads = model.hidden_size, model.head_width, model.num_attention_heads
    projections = hidden * width * (heads + 2 * model.query_groups) + width * heads * hidden
    mlp = (3 if model.swiglu else 2) * hidden * model.ffn_width
    return 2.0 * (projections + mlp) + core_attention_flops(model, seq_length)


def head_flops(model: ModelConfig, padded_vocabulary_size: int) -> float:
    """The output layer: 2 h V."""
    return 2.0 * model.hidden_size * padded_vocabulary_size


def forward_flops_per_token(model: ModelConfig, seq_length: int, padded_vocabulary_size: int) -> float:
    """FLOPs of a forward pass for one token, output layer included: what a teacher costs."""
    return model.num_layers * layer_flops(model, seq_length) + head_flops(model, padded_vocabulary_size)


def flops_per_token(model: ModelConfig, seq_length: int, padded_vocabulary_size: int) -> float:
    """Model FLOPs of forward and backward for one token: recomputation does not count."""
    return 3.0 * forward_flops_per_token(model, seq_length, padded_vocabulary_size)


def num_parameters(model: ModelConfig, padded_vocabulary_size: int, seq_length: int) -> int:
    """Parameters of the whole model, embedding and head included, as megatron-core makes them; a tied weight counts once."""
    hidden, width, bias = model.hidden_size, model.head_width, not model.disable_bias_linear
    norm = 2 if model.normalization == "LayerNorm" else 1  # weight and bias, or a weight
    wide_qkv, wide_fc1 = (
        width * (model.num_attention_heads + 2 * model.query_groups),
        (2 if model.swiglu else 1) * model.ffn_width,
    )
    attention = (hidden + bias) * wide_qkv + (width * model.num_attention_heads + bias) * hidden
    attention += 2 * norm * width if model.qk_layernorm else 0
    mlp = (hidden + bias) * wide_fc1 + (model.ffn_width + bias) * hidden
    learned = model.position_embedding_type == "learned_absolute"
    positions = (model.max_position_embeddings or seq_length) * hidden if learned else 0
    embeddings = padded_vocabulary_size * hidden * (2 if model.untie_embeddings_and_output_weights else 1) + positions
    return model.num_layers * (attention + mlp + 2 * norm * hidden) + norm * hidden + embeddings
