"""The place of every layer is where megatron-core builds it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.errors import UserError
from megatron_salt.model.gpt import transformer_config
from megatron_salt.salt.guidance.layer_place import LayerPlace, place_of_layer


def built(model: ModelConfig, parallel: ParallelConfig) -> dict[int, LayerPlace]:
    """The oracle: {layer: where megatron-core's own arithmetic puts it}."""
    config, found = transformer_config(model, parallel, torch.float32), {}
    count = parallel.num_virtual_stages_per_pipeline_rank
    for stage, chunk in itertools.product(range(parallel.pipeline_model_parallel_size), range(count)):
        virtual = None if parallel.virtual_stages is None else chunk
        first = get_transformer_layer_offset(config, virtual, stage) + 1
        for layer in range(first, first + get_num_layers_to_build(config, virtual, stage)):
            found[layer] = LayerPlace(stage, chunk)
    return found


@pytest.mark.parametrize("num_layers, sizes", [
    (4, dict()),
    (6, dict(pipeline_model_parallel_size=3)),
    (8, dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)),
    (6, dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2,
             account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True)),
    (7, dict(pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=2, decoder_last_pipeline_num_layers=1)),
    (10, dict(pipeline_model_parallel_size=3, num_virtual_stages_per_pipeline_rank=2, decoder_first_pipeline_num_layers=2)),
])  # fmt: skip
def test_every_layer_is_where_megatron_core_builds_it(num_layers: int, sizes: dict[str, Any]) -> None:
    model = ModelConfig(num_layers=num_layers, hidden_size=8, num_attention_heads=2)
    parallel = ParallelConfig(**sizes)
    oracle = built(model, parallel)
    assert sorted(oracle) == list(range(1, num_layers + 1))
    assert {layer: place_of_layer(model, parallel, layer) for layer in oracle} == oracle


@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_outside_the_model_is_refused(layer: int) -> None:
    model = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=2)
    with pytest.raises(UserError, match=f"--let-layer {layer} is not one of the student's layers, 1 to --num-layers 4"):
        place_of_layer(model, ParallelConfig(), layer)
