"""A model that does not fit a layout is refused with flag and number. megatron-core builds each model that is accepted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_salt.config import DataConfig, ModelConfig, ParallelConfig
from megatron_salt.errors import UserError
from megatron_salt.model.gpt import transformer_config
from megatron_salt.model.shapes import check_masking, check_shapes, layers_per_stage

TP2, TP4 = (ParallelConfig(tensor_model_parallel_size=size) for size in (2, 4))
CP2 = ParallelConfig(context_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
PP3 = ParallelConfig(pipeline_model_parallel_size=3)

REFUSED = [
    (dict(num_attention_heads=6, hidden_size=96), TP4, 64, ["--num-attention-heads 6", "--tensor-model-parallel-size = 4"]),
    (dict(num_query_groups=1), TP2, 64, ["--num-query-groups 1", "--tensor-model-parallel-size = 2"]),
    (dict(ffn_hidden_size=130), TP4, 64, ["--ffn-hidden-size 130", "--tensor-model-parallel-size = 4"]),
    (dict(make_vocab_size_divisible_by=2), TP4, 64, ["--make-vocab-size-divisible-by 2", "--tensor-model-parallel-size = 4"]),
    ({}, CP2, 66, ["--seq-length 66", "2 x --context-parallel-size = 4"]),
    ({}, replace(TP4, sequence_parallel=True), 66, ["--seq-length 66", "--tensor-model-parallel-size (under --sequence-parallel) = 4"]),
    ({}, replace(TP4, sequence_parallel=True, context_parallel_size=2), 20,
     ["--seq-length 20", "--context-parallel-size x --tensor-model-parallel-size (under --sequence-parallel) = 8"]),
    (dict(max_position_embeddings=32), ParallelConfig(), 64, ["--seq-length 64", "--max-position-embeddings 32"]),
    (dict(num_layers=7), PP2, 64, ["--num-layers 7", "--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank = 2"]),
    (dict(num_layers=6), replace(PP2, num_virtual_stages_per_pipeline_rank=2), 64,
     ["--num-layers 6", "--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank = 4"]),
    (dict(num_layers=4), replace(PP2, account_for_loss_in_pipeline_split=True), 64,
     ["--num-layers (with the embedding and loss that are counted as layers) 5", "= 2"]),
    (dict(num_layers=8), replace(PP3, decoder_first_pipeline_num_layers=1), 64,
     ["--num-layers 8", "--decoder-first-pipeline-num-layers 1", "--pipeline-model-parallel-size 3", "leaves 7 for 2 stages"]),
    (dict(num_layers=4), replace(PP2, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=2), 64,
     ["--num-layers 4", "--decoder-first-pipeline-num-layers 1", "--decoder-last-pipeline-num-layers 2", "leaves 1 for 0 stages"]),
    (dict(num_layers=4), replace(PP2, decoder_first_pipeline_num_layers=5), 64,
     ["--num-layers 4", "--decoder-first-pipeline-num-layers 5"]),
    (dict(num_layers=4), ParallelConfig(decoder_last_pipeline_num_layers=2), 64,
     ["--decoder-last-pipeline-num-layers", "--pipeline-model-parallel-size above 1, got 1"]),
    (dict(num_layers=4), replace(PP2, decoder_first_pipeline_num_layers=1, account_for_loss_in_pipeline_split=True), 64,
     ["--decoder-first-pipeline-num-layers", "--account-for-loss-in-pipeline-split"]),
    (dict(num_layers=4), replace(PP2, decoder_first_pipeline_num_layers=4), 64, ["--num-layers 4", "without a layer", "[4, 0]"]),
]  # fmt: skip


@pytest.mark.parametrize("model, parallel, seq_length, named", REFUSED)
def test_what_does_not_divide_is_refused_by_flag_and_number(model, parallel, seq_length, named):
    with pytest.raises(UserError) as refused:
        check_shapes(ModelConfig(**{"num_attention_heads": 4, "hidden_size": 64, **model}), parallel, seq_length)
    assert all(words in str(refused.value) for words in named), refused.value


def test_what_divides_is_accepted():
    model = ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=4, num_query_groups=4, ffn_hidden_size=128)
    sizes = ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2,
                           context_parallel_size=2, sequence_parallel=True)  # fmt: skip
    check_shapes(model, sizes, 64)
    check_shapes(model, ParallelConfig(), 7)


def built(model: ModelConfig, parallel: ParallelConfig) -> list[int] | None:
    """Layers that megatron-core gives each pipeline rank. None if it refuses, omits layers, or leaves a rank without a layer."""
    virtual = parallel.virtual_stages
    try:
        config = transformer_config(model, parallel, torch.float32)
        chunks = range(1) if virtual is None else range(virtual)
        counts = [
            sum(get_num_layers_to_build(config, vp_stage=None if virtual is None else chunk, pp_rank=rank) for chunk in chunks)
            for rank in range(parallel.pipeline_model_parallel_size)
        ]
    except (AssertionError, ValueError):
        return None
    return counts if sum(counts) == model.num_layers and min(counts) > 0 else None


def test_layers_are_split_as_megatron_core_splits_them():
    """In some thousand combinations both give the same counts, or both refuse."""
    tried = {True: 0, False: 0}
    for layers, stages, virtual, first, last, embedding, loss in itertools.product(
        (2, 4, 6, 8, 11), (1, 2, 3, 4), (1, 2, 3), (None, 1, 2, 4), (None, 1, 2), (False, True), (False, True)
    ):
        if virtual > 1 and stages == 1:
            continue
        parallel = ParallelConfig(
            pipeline_model_parallel_size=stages, num_virtual_stages_per_pipeline_rank=virtual, decoder_first_pipeline_num_layers=first,
            decoder_last_pipeline_num_layers=last, account_for_embedding_in_pipeline_split=embedding,
            account_for_loss_in_pipeline_split=loss,
        )  # fmt: skip
        model = ModelConfig(num_layers=layers, hidden_size=64, num_attention_heads=4)
        try:
            ours = layers_per_stage(model, parallel)
        except UserError:
            ours = None
        theirs = built(model, parallel)
        needless = (first or last) is not None and stages == 1  # only we refuse it: the flag would have no effect
        assert ours == theirs or (ours is None and needless), (parallel, layers, ours, theirs)
        tried[ours is not None] += 1
    assert min(tried.values()) > 100


def test_position_resets_that_rope_cannot_see_are_refused():
    rope = ModelConfig(position_embedding_type="rope")
    with pytest.raises(UserError, match="--reset-position-ids has no effect with --position-embedding-type rope"):
        check_masking(rope, DataConfig(reset_position_ids=True))
    check_masking(rope, DataConfig(reset_position_ids=True, reset_attention_mask=True))
    check_masking(ModelConfig(), DataConfig(reset_position_ids=True))
