"""FLOPs and parameters of a model, counted as Megatron-LM does: only matrix products, a multiply-add as two FLOPs. Pure.

Figures are FLOPs of the forward pass of one token, unless the docstring says otherwise. The backward pass takes twice as many.
"""

from __future__ import annotations

from megatron_salt.config import ModelConfig


def core_attention_flops(model: ModelConfig, seq_length: int) -> float:
    """Scores and weighted sums of one layer: 2 * 2 d H s/2, with H heads of width d. A causal mask leaves half of the sequence."""
    return 2.0 * 2 * model.head_width * model.num_attention_heads * seq_length / 2


def layer_flops(model: ModelConfig, seq_length: int) -> float:
    """One layer: 2 * (h d (H + 2G) + d H h + 2 d H s/2 + (3 if gated else 2) h f).

    h: hidden size. H, G: heads and key/value heads of width d. f: width of the MLP. s: sequence length.
    """
    hidden, width, heads = model.hidden_size, model.head_width, model.num_attention_heads
    projections = hidden * width * (heads + 2 * model.query_groups) + width * heads * hidden
    mlp = (3 if model.swiglu else 2) * hidden * model.ffn_width
    return 2.0 * (projections + mlp) + core_attention_flops(model, seq_length)


def head_flops(model: ModelConfig, padded_vocabulary_size: int) -> float:
    """The output layer: 2 h V."""
    return 2.0 * model.hidden_size * padded_vocabulary_size


def body_flops(model: ModelConfig, seq_length: int) -> float:
    """All layers, without the output layer: what a teacher's cache saves."""
    return model.num_layers * layer_flops(model, seq_length)


def forward_flops_per_token(model: ModelConfig, seq_length: int, padded_vocabulary_size: int) -> float:
    """FLOPs of the forward pass of one token, output layer included: the cost of a teacher."""
    return body_flops(model, seq_length) + head_flops(model, padded_vocabulary_size)


def flops_per_token(model: ModelConfig, seq_length: int, padded_vocabulary_size: int) -> float:
    """Model FLOPs of forward and backward pass of one token, without recomputation."""
    return 3.0 * forward_flops_per_token(model, seq_length, padded_vocabulary_size)


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one layer."""
    hidden, width, bias = model.hidden_size, model.head_width, not model.disable_bias_linear
    norm = 2 if model.normalization == "LayerNorm" else 1  # weight and bias, or a weight
    wide_qkv, wide_fc1 = (
        width * (model.num_attention_heads + 2 * model.query_groups),
        (2 if model.swiglu else 1) * model.ffn_width,
    )
    attention = (hidden + (bias or model.add_qkv_bias)) * wide_qkv + (width * model.num_attention_heads + bias) * hidden
    attention += 2 * norm * width if model.qk_layernorm else 0
    mlp = (hidden + bias) * wide_fc1 + (model.ffn_width + bias) * hidden
    return attention + mlp + 2 * norm * hidden


def num_parameters(model: ModelConfig, padded_vocabulary_size: int, seq_length: int) -> int:
    """Parameters of the whole model, embedding and head included. A tied weight counts once."""
    hidden, norm = model.hidden_size, 2 if model.normalization == "LayerNorm" else 1
    learned = model.position_embedding_type == "learned_absolute"
    positions = (model.max_position_embeddings or seq_length) * hidden if learned else 0
    embeddings = padded_vocabulary_size * hidden * (2 if model.untie_embeddings_and_output_weights else 1) + positions
    return model.num_layers * layer_parameters(model) + norm * hidden + embeddings
