"""Memory that a rank holds through all of a step, against arithmetic by hand and against the buffers that megatron-core makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.model.flops import num_parameters
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.parallel.layout import Layout, student_layout
from megatron_salt.planner.static import buffer_numbers, stage_tensors, student_bytes, teacher_body_bytes, weight_copies_bytes
from tests.support.small import MODELS, SEQ_LENGTH, VOCABULARY

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCABULARY_256K = 256_000
GIB = 2**30


def example(name: str) -> ModelConfig:
    return from_yaml((EXAMPLES / f"model_{name}.yaml").read_text(), name).model


def static_gib(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> list[float]:
    """GiB of each pipeline stage in bfloat16."""
    layout = student_layout(parallel, world_size)
    tensors = stage_tensors(model, parallel, rows=VOCABULARY_256K // layout.tensor, seq_length=1280, precision=TORCH)
    return [
        sum(student_bytes(one, parallel, layout, itemsize=2, precision=TORCH, capability=None).values()) / GIB
        for one in tensors
    ]


def layer_by_hand(hidden: int, ffn: int, tensor: int) -> int:
    """qkv 3 h h, proj h h, gate and up 2 h f, down h f; two norms that are not split."""
    return (4 * hidden * hidden + 3 * hidden * ffn) // tensor + 2 * hidden


@pytest.mark.parametrize("tensor, pipeline, world_size", [(1, 1, 64), (2, 2, 64), (4, 4, 32)])
@pytest.mark.parametrize("name, hidden, ffn, layers", [("2p8b", 2560, 6656, 28), ("8p6b", 4096, 11520, 36)])
@pytest.mark.parametrize("sharded", [True, False])
def test_static_memory_is_that_of_hand_arithmetic(name, hidden, ffn, layers, tensor, pipeline, world_size, sharded):
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, use_distributed_optimizer=sharded
    )
    shards = world_size // (tensor * pipeline) if sharded else 1
    embedding, body = VOCABULARY_256K * hidden // tensor, layers // pipeline * layer_by_hand(hidden, ffn, tensor)
    # bfloat16 weight, float32 gradient, and of a share float32 main parameter and two moments; the last stage has a copy of the embedding
    numbers = [body + embedding * (stage in (0, pipeline - 1)) for stage in range(pipeline)]
    expected = [count * (2 + 4 + 12 / shards) / GIB for count in numbers]
    assert static_gib(example(name), parallel, world_size) == pytest.approx(expected, rel=0.02)


def test_the_2p8b_model_is_what_its_file_says():
    [whole] = static_gib(example("2p8b"), ParallelConfig(), 1)
    assert whole == pytest.approx(2.82e9 * 18 / GIB, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pipeline", [1, 2])
def test_every_parameter_is_counted(name, pipeline):
    model, rows = MODELS[name], MODELS[name].padded_vocabulary_size(VOCABULARY)
    parallel = ParallelConfig(pipeline_model_parallel_size=pipeline)
    stages = stage_tensors(model, parallel, rows=rows, seq_length=SEQ_LENGTH, precision=TORCH)
    copy = rows * model.hidden_size * (pipeline == 2 and not model.untie_embeddings_and_output_weights)
    assert sum(sum(stage.sizes) for stage in stages) == num_parameters(model, rows, SEQ_LENGTH) + copy


def test_buffers_end_where_all_ranks_have_equal_shares():
    assert buffer_numbers((10, 65), shards=3, distributed_optimizer=True) == 384  # 64 + 128, up to a multiple of 3 x 128
    assert buffer_numbers((10, 65), shards=3, distributed_optimizer=False) == 75


def test_fp8_keeps_copies_of_the_linears_of_quantized_layers():
    model, parallel, layout = example("2p8b"), ParallelConfig(use_distributed_optimizer=True), Layout(data=8)
    fp8 = Precision(implementation="transformer_engine", fp8_format="hybrid", bf16_layers=(1, 1))
    [tensors] = stage_tensors(model, parallel, rows=VOCABULARY_256K, seq_length=1280, precision=fp8)
    linears = 26 * (4 * 2560**2 + 3 * 2560 * 6656)
    kinds = student_bytes(tensors, parallel, layout, itemsize=2, precision=fp8, capability=(9, 0))
    assert kinds["fp8 copies"] == 2 * linears
    alone = student_bytes(tensors, parallel, layout, itemsize=2, precision=replace(fp8, fp8_params=True), capability=(9, 0))
    assert (alone["fp8 copies"], kinds["parameters"] - alone["parameters"]) == (linears, linears)
    assert kinds["parameters"] - teacher_body_bytes(tensors, 2, fp8) == pytest.approx(linears, rel=1e-3)
    assert weight_copies_bytes(fp8, (10, 0)) == 1 and weight_copies_bytes(replace(fp8, fp8_recipe="mxfp8"), (10, 0)) > 2
    assert weight_copies_bytes(TORCH, (9, 0)) == 0
