"""Arithmetic of a model, counted as Megatron-LM counts it: matrix multiplications alone, a multiply-add as two. Pure.

All figures are FLOPs of one token's forward pass where nothing else is said; backward takes twice as many.
"""

from __future__ import annotations

from megatron_salt.config import ModelConfig


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


def head_flops(model: ModelConfig, padded_vocabulary: int) -> float:
    """The output layer: 2 h V."""
    return 2.0 * model.hidden_size * padded_vocabulary


def flops_per_token(model: ModelConfig, seq_length: int, padded_vocabulary: int) -> float:
    """Model FLOPs of forward and backward for one token: recomputation does not count."""
    return 3.0 * (model.num_layers * layer_flops(model, seq_length) + head_flops(model, padded_vocabulary))
