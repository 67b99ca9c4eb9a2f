"""Bytes of memory that layers, embedding and optimizer move beside their matrix products. Pure.

In wide models on large batches they are little. In narrow ones they take as long as the products. Two forms of a layer are counted:
torch's operations, each of which reads and writes whole tensors, and Transformer Engine's fused ones. Counts are of values for each
token; a value has 2 bytes in bfloat16 and 4 in float32. Dropout and the biases of linear layers are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_salt.cards import Rates
from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.flops import layer_flops, layer_parameters

UPDATE_BYTES = 52
"""Bytes that a step of the optimizer moves for each parameter on a rank, all in float32: the gradient buffer zeroed (4), divided by the
number of tokens (8), its norm (4), clipped (8), AdamW on parameter, gradient and two moments (28)."""


def layer_values(model: ModelConfig, fused: bool) -> float:
    """Values that one layer reads and writes in a forward pass of one token, products left out.

    h: hidden size, f: width of the MLP, q and k: widths of all queries and keys. Two additions of 3 h to the residual stream; attention
    reads queries, keys and values and writes as much as the queries (2 q + 2 k). torch: RMSNorm is a square, a mean and two products (7 h),
    LayerNorm one operation (2 h); rotary positions are twelve passes over queries and keys (sign, halves joined, two products, a sum, rest
    joined); a gated MLP adds an offset (7 f), squared ReLU two operations (4 f). Fused: 2 h, 2 (q + k), 3 f, 2 f.
    """
    hidden, mlp = model.hidden_size, model.ffn_width
    queries, keys = model.head_width * model.num_attention_heads, model.head_width * model.query_groups
    rotary = model.position_embedding_type == "rope"
    values = 6.0 * hidden + 2 * (queries + keys)
    if fused:
        return values + 4 * hidden + (2 * (queries + keys) if rotary else 0) + (3 if model.swiglu else 2) * mlp
    values += 2 * (7 if model.normalization == "RMSNorm" else 2) * hidden
    values += 12 * (queries + keys) if rotary else 0
    return values + (7 if model.swiglu else 4 if model.squared_relu else 2) * mlp


def layer_seconds(model: ModelConfig, seq_length: int, itemsize: int, fused: bool, rates: Rates) -> float:
    """Seconds of one layer's forward pass of one token on one rank; in FLOPs if `rates` are FLOPS_ALONE. A backward pass takes twice as
    long: it computes two products for each one, and its other operations move 1.9 times as much by our count."""
    return layer_flops(model, seq_length) / rates.flops + layer_values(model, fused) * itemsize / rates.bytes


def embedding_bytes(model: ModelConfig, rows: int, itemsize: int) -> int:
    """Bytes that the embedding's gradient moves in one microbatch: a dense gradient is zeroed, read, and added to float32 `main_grad`."""
    return rows * model.hidden_size * (2 * itemsize + 8)


def update_bytes(model: ModelConfig, parallel: ParallelConfig, stage_layers: Sequence[int], rows: int) -> float:
    """Bytes that the optimizer moves in one step, on the rank with most parameters. rows: of the output weight on a rank.

    stage_layers: layers of each pipeline stage. Data-parallel ranks that would share the work are left out, so this is an upper bound.
    """
    layer, weight = layer_parameters(model) / parallel.tensor_model_parallel_size, rows * model.hidden_size
    stages = [layers * layer for layers in stage_layers]
    stages[0] += weight
    if model.untie_embeddings_and_output_weights or len(stages) > 1:
        stages[-1] += weight
    return UPDATE_BYTES * max(stages)
