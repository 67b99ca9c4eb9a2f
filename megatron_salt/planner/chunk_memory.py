"""The memory of one model chunk with any number of layers, from the trace of its parts: what a microbatch keeps, and the peaks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.precision import Precision
from megatron_salt.model.shapes import layers_per_stage
from megatron_salt.planner.trace import ChunkTrace, Part

Bytes = Counter[str]
"""Bytes by kind"""
ACTIVATIONS, HEAD = "activations", "head"


@dataclass(frozen=True)
class Chunk:
    """A model chunk of a pipeline rank."""

    layers: int
    first: bool
    last: bool


@dataclass(frozen=True, kw_only=True)
class ChunkMemory:
    """Bytes of one microbatch in one chunk, by kind."""

    kept: Bytes
    """Between its forward and its backward pass"""
    forward: Bytes
    """At the peak of its forward pass"""
    backward: Bytes
    """At the peak of its backward pass, with what it still keeps"""


def chunks_of_stage(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[Chunk]:
    """The chunks of a pipeline rank, in order. A chunk that counts the embedding or the loss as a layer has one less."""
    stages, count = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    layers = layers_per_stage(model, parallel)[stage]
    embedding = parallel.account_for_embedding_in_pipeline_split and stage == 0
    loss = parallel.account_for_loss_in_pipeline_split and stage == stages - 1
    each = (layers + embedding + loss) // count
    return [
        Chunk(
            layers=each - (embedding and number == 0) - (loss and number == count - 1),
            first=stage == 0 and number == 0,
            last=stage == stages - 1 and number == count - 1,
        )
        for number in range(count)
    ]


@dataclass(frozen=True)
class _Step:
    """A part of a pass: its kind, and what it does to the level of memory."""

    kind: str
    part: Part


def chunk_memory(chunk: Chunk, trace: ChunkTrace, parallel: ParallelConfig, frees_outputs: bool) -> ChunkMemory:
    """The memory of a chunk. trace: of its ends. frees_outputs: whether what was sent to the next stage is freed (on a GPU)."""
    received = 0 if chunk.first else trace.hidden
    level = Bytes({ACTIVATIONS: received})
    forward = _walk(level, _forward(chunk, trace, parallel))
    if not chunk.last and frees_outputs:
        level[ACTIVATIONS] -= trace.hidden
    kept = Bytes(level)
    level[ACTIVATIONS] += 0 if chunk.last else trace.hidden  # the gradient from the next stage
    backward = _walk(level, _backward(chunk, trace, parallel))
    return ChunkMemory(kept=kept, forward=forward, backward=backward)


def _walk(level: Bytes, steps: Iterator[_Step]) -> Bytes:
    """Bytes at the peak of the steps. Changes `level` to that after them."""
    highest = Bytes(level)
    for step in steps:
        peak = Bytes(level)
        peak[step.kind] += step.part.peak
        if peak.total() > highest.total():
            highest = peak
        level[step.kind] += step.part.change
    return highest


def _recomputed(layers: int, parallel: ParallelConfig) -> tuple[list[int], int]:
    """(sizes of the groups of layers that are recomputed together, layers that are not recomputed after them)."""
    if parallel.recompute_granularity != "full":
        return [], layers
    count = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "block":
        recomputed = min(layers, count)
        return [1] * recomputed, layers - recomputed
    return [min(count, layers - start) for start in range(0, layers, count)], 0


def _forward(chunk: Chunk, trace: ChunkTrace, parallel: ParallelConfig) -> Iterator[_Step]:
    groups, plain = _recomputed(chunk.layers, parallel)
    if chunk.first:
        yield _Step(ACTIVATIONS, trace.embedding)
    for _ in groups:  # without a graph: of each layer its output is left
        yield _Step(ACTIVATIONS, Part(trace.layer.peak, trace.hidden))
    for _ in range(plain):
        yield _Step(ACTIVATIONS, trace.layer)
    if chunk.last:
        yield _Step(HEAD, trace.head)


def _backward(chunk: Chunk, trace: ChunkTrace, parallel: ParallelConfig) -> Iterator[_Step]:
    groups, plain = _recomputed(chunk.layers, parallel)
    if chunk.last:
        yield _Step(HEAD, Part(trace.head_backward.peak, -trace.head.change))  # the last bytes of the loss go a moment later
        yield _Step(ACTIVATIONS, Part(0, trace.head_backward.change + trace.head.change))
    for _ in range(plain):
        yield _Step(ACTIVATIONS, trace.layer_backward)
    for size in reversed(groups):
        whole = size * trace.layer.change
        peak = max(whole - trace.layer.change + trace.layer.peak, whole + trace.layer_backward.peak)
        yield _Step(ACTIVATIONS, Part(peak, -trace.hidden))
    if chunk.first:
        yield _Step(ACTIVATIONS, trace.embedding_backward)


def in_fp8(
    trace: ChunkTrace, model: ModelConfig, parallel: ParallelConfig, precision: Precision, tokens: int, share: float
) -> ChunkTrace:
    """A trace in bfloat16 as it is where Transformer Engine multiplies in FP8 or FP4. share: of the layers that are quantized.

    The inputs of the four linears are kept in one orientation, a byte a number: that of qkv, fc1 and fc2 in place of the bfloat16 one, that
    of proj beside it, which attention keeps. A gradient is quantized in both orientations before it is multiplied; that of fc1 is the
    widest. tokens: of a microbatch on a context-parallel rank.
    """
    if not precision.quantized or precision.implementation != "transformer_engine":
        return trace
    tensor = parallel.tensor_model_parallel_size
    narrow = tokens * model.hidden_size // (tensor if parallel.sequence_parallel else 1)
    heads = tokens * model.num_attention_heads * model.head_width // tensor
    width = tokens * model.ffn_width // tensor
    byte = 9 / 16 if precision.fp4_format is not None else 33 / 32 if precision.fp8_recipe == "mxfp8" else 1
    saved = int(share * (heads * byte - (2 * narrow + width) * (2 - byte)))
    gradient = int(2 * byte * width * (2 if model.swiglu else 1))
    layer, back = trace.layer, trace.layer_backward
    return ChunkTrace(
        embedding=trace.embedding, layer=Part(layer.peak + max(saved, 0), layer.change + saved), head=trace.head,
        head_backward=trace.head_backward, layer_backward=Part(back.peak + gradient, back.change - saved),
        embedding_backward=trace.embedding_backward, hidden=trace.hidden, before_layer=trace.before_layer, kept=trace.kept,
    )  # fmt: skip
