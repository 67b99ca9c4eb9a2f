"""The layouts that --search tries, and the flags of each. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_salt.config import ParallelConfig, RunConfig, SaltConfig, flag
from megatron_salt.errors import UserError
from megatron_salt.parallel.layout import Layout
from megatron_salt.train.plan import RunPlan, check

MOST_STAGES, MOST_CHUNKS, MOST_SAMPLES = 16, 4, 16
"""Of a layout that is tried: pipeline stages, model chunks of a stage, samples of a microbatch."""
MOST_MOVED = 4
"""Layers that the last pipeline stage has fewer than the others at most: it also has the head."""
FEWEST_TOKENS = 1024
"""Tokens of a sequence that a context-parallel rank keeps at least."""
RECOMPUTED: tuple[tuple[Literal["full", "selective"] | None, Literal["uniform"] | None, int | None], ...] = (
    (None, None, None),
    ("selective", None, None),
    ("full", "uniform", 1),
)
"""--recompute-granularity, -method and -num-layers: more is recomputed each time"""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that the flags of the trainer allow."""

    config: RunConfig
    layout: Layout
    plan: RunPlan


@dataclass(frozen=True, kw_only=True)
class Space:
    """All layouts of a search."""

    candidates: tuple[Candidate, ...]
    refused: tuple[str, ...]
    """The trainer's message for each of the others"""


def space(config: RunConfig, world_size: int, gpus_per_node: int) -> Space:
    """Every layout that is tried: tp, pp, chunks, cp, micro-batch, recomputation, and the teacher's layout. The batch stays."""
    candidates, refused = [], []
    for parallel in _parallels(config, world_size, gpus_per_node):
        for micro in _powers(min(MOST_SAMPLES, _samples_of_replica(config, world_size // parallel.replica_ranks))):
            for salt in _teachers(config.salt, parallel, micro):
                other = replace(config, parallel=parallel, salt=salt, training=replace(config.training, micro_batch_size=micro))
                try:
                    layout, plan = check(other, world_size)
                except UserError as error:
                    refused.append(str(error))
                else:
                    candidates.append(Candidate(config=other, layout=layout, plan=plan))
    return Space(candidates=tuple(candidates), refused=tuple(refused))


def flags_of(config: RunConfig, given: RunConfig) -> list[str]:
    """The flags to add to those of `given`, so that the run has the layout of `config`."""
    words = []
    for section in (f.name for f in fields(RunConfig)):
        new, old = getattr(config, section), getattr(given, section)
        for field in fields(new):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                name = flag(field.name)
                words.append((name if value else f"--no-{name[2:]}") if isinstance(value, bool) else f"{name} {value}")
    return words


def _parallels(config: RunConfig, world_size: int, gpus_per_node: int) -> Iterator[ParallelConfig]:
    """The student's layouts. A tensor-parallel group stays inside a node."""
    layers = config.model.num_layers
    for tensor in _powers(min(gpus_per_node, world_size, config.model.num_attention_heads)):
        for stages in range(1, min(MOST_STAGES, world_size, layers) + 1):
            for chunks, last in _splits(layers, stages):
                for context in _powers(max(1, config.training.seq_length // FEWEST_TOKENS)):
                    if world_size % (tensor * stages * context):
                        continue
                    for granularity, method, count in RECOMPUTED:
                        yield replace(
                            config.parallel, tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1,
                            pipeline_model_parallel_size=stages, num_virtual_stages_per_pipeline_rank=chunks,
                            context_parallel_size=context, decoder_first_pipeline_num_layers=None,
                            decoder_last_pipeline_num_layers=last, account_for_embedding_in_pipeline_split=False,
                            account_for_loss_in_pipeline_split=False, recompute_granularity=granularity,
                            recompute_method=method, recompute_num_layers=count,
                        )  # fmt: skip


def _splits(layers: int, stages: int) -> Iterator[tuple[int, int | None]]:
    """(model chunks of a stage, layers of the last stage) of the ways to split layers. None: as many as every other stage has.

    With chunks all stages have the same number. Without, the last one may have up to MOST_MOVED fewer than its share.
    """
    if layers % stages == 0:
        for chunks in range(1, (MOST_CHUNKS if stages > 1 else 1) + 1):
            if layers // stages % chunks == 0:
                yield chunks, None
    for last in range(max(1, layers // stages - MOST_MOVED), -(-layers // stages)) if stages > 1 else ():
        if (layers - last) % (stages - 1) == 0:
            yield 1, last


def _teachers(salt: SaltConfig, parallel: ParallelConfig, micro: int) -> Iterator[SaltConfig]:
    """The teacher's layouts. Its tensor-parallel group stays inside one of the student's; as many samples go forward as were asked for."""
    if salt.teacher_load is None:
        yield replace(salt, stage2_micro_batch_size=None)
        return
    asked = salt.teacher_micro_batch_size or micro
    merged = asked if asked % micro == 0 else micro
    for tensor in _powers(parallel.tensor_model_parallel_size):
        for stages in (1, 2) if parallel.pipeline_model_parallel_size % 2 == 0 else (1,):
            yield replace(
                salt, teacher_tensor_model_parallel_size=tensor, teacher_pipeline_model_parallel_size=stages,
                teacher_micro_batch_size=merged, stage2_micro_batch_size=None,
            )  # fmt: skip


def _samples_of_replica(config: RunConfig, replicas: int) -> int:
    """Samples of a replica in a step, at least 1."""
    training = config.training
    whole = training.global_batch_size or training.micro_batch_size * replicas
    return max(1, whole // replicas)


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**power for power in range(most.bit_length())]
