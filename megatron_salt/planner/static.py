"""Bytes that a rank holds through all of a step: parameters, gradients, optimizer state, FP8 copies, the teacher's weights. Pure.

The sizes of all tensors of a rank follow from the flags. megatron-core's buffers are built of them (0.16.1 and 0.19.2,
`_ParamAndGradBuffer`): with the distributed optimizer each parameter begins at a multiple of 64 numbers, and a buffer ends at one of
lcm(ranks of the shard, 128).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.precision import Precision
from megatron_salt.model.shapes import layers_per_stage
from megatron_salt.parallel.hardware import Capability
from megatron_salt.parallel.layout import Layout

MAIN_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4
"""Bytes of a parameter: its float32 main parameter, both moments, and its gradient."""
WITHOUT_TRANSPOSE: Capability = (10, 0)
"""The compute capability from which products of FP8 need no transposed copy of a weight that has one scale."""


@dataclass(frozen=True)
class LayerTensors:
    """Numbers in the tensors of one layer on one tensor-parallel rank."""

    products: tuple[int, ...]
    """Weights of the four linear layers"""
    others: tuple[int, ...]
    """Biases and norms"""

    @property
    def all(self) -> tuple[int, ...]:
        """All tensors."""
        return (*self.products, *self.others)


def layer_tensors(model: ModelConfig, tensor: int) -> LayerTensors:
    """The tensors of a layer on one of `tensor` ranks. Outputs of the first linear of attention and MLP are split, inputs of the second."""
    hidden, head, bias = model.hidden_size, model.head_width, not model.disable_bias_linear
    qkv, heads = (
        head * (model.num_attention_heads + 2 * model.query_groups) // tensor,
        head * model.num_attention_heads // tensor,
    )
    wide, width = (2 if model.swiglu else 1) * model.ffn_width // tensor, model.ffn_width // tensor
    norm = [hidden] * (2 if model.normalization == "LayerNorm" else 1)
    others = [*norm, *norm]
    if model.qk_layernorm:
        others += [head] * (2 * len(norm))
    others += [qkv] * (bias or model.add_qkv_bias) + [hidden, wide, hidden] * bias
    return LayerTensors((hidden * qkv, heads * hidden, hidden * wide, width * hidden), tuple(others))


@dataclass(frozen=True, kw_only=True)
class StageTensors:
    """Numbers in the tensors of one model on the ranks of one pipeline stage."""

    layers: int
    """Layers of the stage"""
    quantized_layers: int
    """Those of them whose products are in FP8 or FP4"""
    layer: LayerTensors
    ends: tuple[int, ...]
    """Embedding, learned positions, final norm and output weight, as far as the stage has them"""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of each tensor."""
        return self.layer.all * self.layers + self.ends

    @property
    def quantized(self) -> int:
        """Numbers of weights whose products are in FP8 or FP4."""
        return self.quantized_layers * sum(self.layer.products)


def stage_tensors(
    model: ModelConfig, parallel: ParallelConfig, *, rows: int, seq_length: int, precision: Precision, has_head: bool = True
) -> list[StageTensors]:
    """The tensors of each pipeline stage, over all its virtual stages. rows: of the embedding on a rank. Raises UserError.

    has_head: False for the body of a teacher."""
    counts, stages = layers_per_stage(model, parallel), parallel.pipeline_model_parallel_size
    norm = (model.hidden_size,) * (2 if model.normalization == "LayerNorm" else 1)
    matrix, tied = rows * model.hidden_size, not model.untie_embeddings_and_output_weights
    result = []
    for stage, count in enumerate(counts):
        ends: tuple[int, ...] = ()
        if stage == 0:
            ends += (matrix,)
            if model.position_embedding_type == "learned_absolute":
                ends += ((model.max_position_embeddings or seq_length) * model.hidden_size,)
        if stage == stages - 1:
            ends += norm
            if has_head and not (tied and stages == 1):
                ends += (matrix,)
        first, last = sum(counts[:stage]), sum(counts[: stage + 1])
        inner = range(precision.bf16_layers[0], model.num_layers - precision.bf16_layers[1])
        quantized = max(0, min(last, inner.stop) - max(first, inner.start)) if precision.quantized else 0
        result.append(
            StageTensors(
                layers=count,
                quantized_layers=quantized,
                layer=layer_tensors(model, parallel.tensor_model_parallel_size),
                ends=ends,
            )
        )
    return result


def buffer_numbers(sizes: tuple[int, ...], shards: int, distributed_optimizer: bool) -> int:
    """Numbers in the buffers that hold tensors of these sizes. shards: ranks that share the optimizer's state."""
    if not distributed_optimizer:
        return sum(sizes)
    padded, multiple = sum(-(-size // 64) * 64 for size in sizes), math.lcm(shards, 128)
    return -(-padded // multiple) * multiple


def weight_copies_bytes(precision: Precision, capability: Capability | None) -> float:
    """Bytes that the FP8 or FP4 copies of one number of a weight take between microbatches.

    Forward and backward products read a weight in two orientations. Each recipe keeps both, but for those with one scale a tensor on a GPU
    that multiplies either orientation. mxfp8 adds a byte of scale for 32 numbers, nvfp4 one for 16.
    """
    if precision.fp4_format is not None:
        return 2 * (0.5 + 1 / 16)
    if precision.fp8_format is None:
        return 0.0
    if precision.fp8_recipe == "mxfp8":
        return 2 * (1 + 1 / 32)
    either = capability is not None and capability >= WITHOUT_TRANSPOSE and precision.fp8_recipe in ("tensorwise", "delayed")
    return 1.0 if either else 2.0


def student_bytes(
    tensors: StageTensors,
    parallel: ParallelConfig,
    layout: Layout,
    *,
    itemsize: int,
    precision: Precision,
    capability: Capability | None,
) -> dict[str, int]:
    """{kind: bytes} of a rank of the student. itemsize: bytes of a parameter, 2 or 4; a float32 parameter is its own main parameter."""
    sharded, shards = parallel.use_distributed_optimizer, layout.data * layout.context
    numbers = buffer_numbers(tensors.sizes, shards, sharded)
    copies = tensors.quantized * weight_copies_bytes(precision, capability)
    parameters = numbers * itemsize
    if precision.fp8_params:  # the parameter is itself the copy that the forward product reads
        parameters -= tensors.quantized * (itemsize - 1)
        copies = max(0.0, copies - tensors.quantized)
    state = (MOMENT_BYTES + (MAIN_BYTES if itemsize < 4 else 0)) * numbers // (shards if sharded else 1)
    return {"parameters": parameters, "gradients": GRADIENT_BYTES * numbers, "optimizer": state, "fp8 copies": int(copies)}


def teacher_body_bytes(tensors: StageTensors, itemsize: int, precision: Precision) -> int:
    """Bytes of the teacher's layers on a rank. In FP8 its linears keep one orientation alone."""
    whole = sum(tensors.sizes) * itemsize
    if not precision.quantized:
        return whole
    scale = 1 / 32 if precision.fp8_recipe == "mxfp8" else 0
    return int(whole - tensors.quantized * (itemsize - 1 - scale))


def microbatch_bytes(samples: int, seq_length: int, context: int, documents: bool) -> int:
    """Bytes of the microbatches of a step on a rank, for `samples` samples: tokens, labels and positions in int64, the mask in float32; and
    the number of each token's document, which context parallelism does not cut."""
    return samples * seq_length * 28 // context + (8 * samples * seq_length if documents else 0)
