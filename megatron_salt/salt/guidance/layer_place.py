"""Which pipeline rank, and which of its model chunks, holds a layer, and which ranks the teacher's hidden states go to. Pure.

Layers are dealt out as megatron-core does (`get_transformer_layer_offset`): over the first chunk of each pipeline rank, then over the
second, and so on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_salt.config import ModelConfig, ParallelConfig, RunConfig, SaltConfig
from megatron_salt.errors import UserError
from megatron_salt.model.shapes import layers_per_stage
from megatron_salt.salt.schedule import StepWeights


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer of the student is."""

    stage: int
    """Pipeline rank."""
    chunk: int
    """Number of the rank's model chunk; 0 without virtual stages."""


@dataclass(frozen=True)
class GuidedLayer:
    """The layer of the student that the teacher's hidden states guide."""

    layer: int
    """Counted from 1."""
    place: LayerPlace


def guided_layer(salt: SaltConfig, model: ModelConfig, parallel: ParallelConfig) -> GuidedLayer | None:
    """The guided layer of a run; None without guidance. Raises UserError."""
    return GuidedLayer(salt.let_layer, place_of_layer(model, parallel, salt.let_layer)) if salt.guides_hidden else None


def stages_that_use(weights: StepWeights, num_stages: int, guided: GuidedLayer | None) -> frozenset[int]:
    """Pipeline stages of the student, of `num_stages`, that use the teacher's hidden states in a step with these weights."""
    last = frozenset() if weights.soft_labels is None else frozenset({num_stages - 1})
    return last if weights.hidden is None or guided is None else last | {guided.place.stage}


def stages_of_run(config: RunConfig) -> frozenset[int]:
    """`stages_that_use` in the first step, in which everything is taught. Raises UserError."""
    salt, parallel = config.salt, config.parallel
    weights = StepWeights(soft_labels=0.0 if salt.has_soft_labels else None, hidden=0.0 if salt.guides_hidden else None)
    return stages_that_use(weights, parallel.pipeline_model_parallel_size, guided_layer(salt, config.model, parallel))


def place_of_layer(model: ModelConfig, parallel: ParallelConfig, layer: int) -> LayerPlace:
    """The place of layer `layer`, counted from 1. Raises UserError where the model has no such layer."""
    if not 1 <= layer <= model.num_layers:
        raise UserError(f"--let-layer {layer} is not one of the student's layers, 1 to --num-layers {model.num_layers}")
    stages, count = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    embedding, loss = parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split
    of_stages = layers_per_stage(model, parallel)
    passed = 0
    for chunk, stage in itertools.product(range(count), range(stages)):
        counts_embedding, counts_loss = embedding and stage == 0, loss and stage == stages - 1
        passed += (of_stages[stage] + counts_embedding + counts_loss) // count
        passed -= (counts_embedding and chunk == 0) + (counts_loss and chunk == count - 1)
        if layer <= passed:
            return LayerPlace(stage, chunk)
    raise AssertionError((layer, passed))
