"""Chunks of any number of layers from traced parts, by hand arithmetic on small numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.precision import Precision
from megatron_salt.planner.chunk_memory import Chunk, chunk_memory, chunks_of_stage, in_fp8
from megatron_salt.planner.trace import ChunkTrace, Part

TRACE = ChunkTrace(
    embedding=Part(15, 10), layer=Part(130, 100), head=Part(500, 70), head_backward=Part(20, -70), layer_backward=Part(40, -100),
    embedding_backward=Part(300, -10), hidden=10, before_layer=110, kept=0,
)  # fmt: skip
PLAIN = ParallelConfig()


def totals(chunk: Chunk, parallel: ParallelConfig = PLAIN, frees_outputs: bool = False) -> tuple[int, int, int]:
    memory = chunk_memory(chunk, TRACE, parallel, frees_outputs)
    return memory.kept.total(), memory.forward.total(), memory.backward.total()


def test_a_whole_model_keeps_all_its_layers_and_peaks_in_its_head():
    assert totals(Chunk(4, first=True, last=True)) == (10 + 400 + 70, 10 + 400 + 500, 10 + 400 + 70 + 20)
    memory = chunk_memory(Chunk(4, first=True, last=True), TRACE, PLAIN, frees_outputs=False)
    assert memory.forward == {"activations": 410, "head": 500}


def test_a_stage_in_the_middle_keeps_what_it_received():
    kept, forward, backward = totals(Chunk(4, first=False, last=False))
    assert (kept, forward) == (10 + 400, 10 + 300 + 130)
    assert backward == 10 + 400 + 10 + 40  # and the gradient that it receives
    assert totals(Chunk(4, first=False, last=False), frees_outputs=True)[0] == 400


def test_the_gradient_of_the_embedding_comes_when_the_layers_are_gone():
    assert totals(Chunk(1, first=True, last=False))[2] == max(10 + 100 + 10 + 40, 10 + 10 + 300)


@pytest.mark.parametrize(
    "method, count, kept, backward",
    [
        ("uniform", 1, 10 + 4 * 10, 50 + max(130, 100 + 40)),
        ("uniform", 2, 10 + 2 * 10, 30 + max(100 + 130, 200 + 40)),
        ("block", 1, 10 + 10 + 300, 320 + 40),
        ("block", 9, 10 + 4 * 10, 50 + max(130, 100 + 40)),
    ],
)
def test_of_recomputed_layers_the_inputs_stay_and_one_group_comes_back(method, count, kept, backward):
    parallel = ParallelConfig(recompute_granularity="full", recompute_method=method, recompute_num_layers=count)
    found = totals(Chunk(4, first=True, last=False), parallel)
    assert found[0] == kept
    assert found[2] == max(backward + 10, 10 + 10 + 300)


def test_chunks_have_the_layers_that_the_flags_give_them():
    model = ModelConfig(num_layers=14)
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2, account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    )  # fmt: skip
    found = [[(chunk.layers, chunk.first, chunk.last) for chunk in chunks_of_stage(model, parallel, stage)] for stage in (0, 1)]
    assert found == [[(3, True, False), (4, False, False)], [(4, False, False), (3, False, True)]]


def test_fp8_keeps_a_byte_for_each_number_that_a_linear_reads():
    model = ModelConfig(num_layers=1, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, swiglu=True)
    fp8 = Precision(implementation="transformer_engine", fp8_format="hybrid")
    found = in_fp8(TRACE, model, PLAIN, fp8, tokens=10, share=1.0)
    saved = 10 * (64 - 64 - 64 - 128)  # proj beside attention's result; qkv, fc1 and fc2 in place of two bytes
    assert found.layer == Part(130, 100 + saved) and found.layer_backward == Part(40 + 2 * 10 * 256, -100 - saved)
    assert in_fp8(TRACE, model, PLAIN, fp8, tokens=10, share=0.5).layer.change == 100 + saved // 2
    assert in_fp8(TRACE, model, PLAIN, replace(fp8, fp8_format=None), tokens=10, share=1.0) == TRACE
