"""Small runs that the tests of the planner plan, trace and carry out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from megatron_salt.config import ModelConfig, ParallelConfig, RunConfig, SaltConfig, TrainingConfig
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.planner.planned_run import PlannedRun, PlannedTeacher
from megatron_salt.train.plan import check
from tests.support.small import SMALL, VOCABULARY
from tests.support.teaching import TEACHER

MODEL = replace(SMALL, num_layers=4, hidden_size=128, ffn_hidden_size=320)
"""Large enough that the states of random generators do not count."""
FULL: dict[str, Any] = {"recompute_granularity": "full"}


def planned(
    world: int,
    teacher: tuple[int, int] | None = None,
    *,
    merge: int = 1,
    bf16: bool = True,
    model: ModelConfig = MODEL,
    **parallel: Any,
) -> PlannedRun:
    """A run on CPUs of 8 samples a step. teacher: its tp and pp; None: there is none."""
    salt = SaltConfig()
    if teacher is not None:
        salt = SaltConfig(
            teacher_load="teacher", kd_steps=5, teacher_tensor_model_parallel_size=teacher[0],
            teacher_pipeline_model_parallel_size=teacher[1], teacher_micro_batch_size=2 * merge,
        )  # fmt: skip
    training = TrainingConfig(
        seq_length=64, micro_batch_size=2, global_batch_size=8, train_iters=10, bf16=bf16, loss_chunk_tokens=48
    )
    config = RunConfig(model=model, parallel=ParallelConfig(**parallel), salt=salt, training=training)
    layout, plan = check(config, world)
    return PlannedRun(
        config=config, layout=layout, plan=plan, vocabulary_size=VOCABULARY, precision=TORCH, device="cpu", capability=None,
        teacher=None if teacher is None else PlannedTeacher(model=TEACHER, vocabulary_size=VOCABULARY, precision=TORCH),
    )  # fmt: skip


QUICK = {
    "distributed optimizer": planned(2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    "pp2, teacher tp2": planned(2, (2, 1), pipeline_model_parallel_size=2),
}
"""The cases that every run of the tests has."""

RUNS = QUICK | {
    "plain": planned(1),
    "float32": planned(1, bf16=False),
    "teacher": planned(1, (1, 1), merge=2),
    "tp2 with sequences split": planned(2, (1, 1), tensor_model_parallel_size=2, sequence_parallel=True),
    "pp4, teacher pp2": planned(4, (1, 2), pipeline_model_parallel_size=4),
    "pp2, interleaved": planned(2, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
    "cp2": planned(2, (1, 1), context_parallel_size=2, use_distributed_optimizer=True),
    "layers recomputed in pairs": planned(1, **FULL, recompute_method="uniform", recompute_num_layers=2),
    "some layers recomputed": planned(2, **FULL, recompute_method="block", recompute_num_layers=2, pipeline_model_parallel_size=2),
    "attention recomputed": planned(1, recompute_granularity="selective"),
    "gpt2": planned(1, model=replace(MODEL, swiglu=False, normalization="LayerNorm", position_embedding_type="learned_absolute")),
}  # fmt: skip


def on_gpus(run: PlannedRun, implementation: Literal["torch", "transformer_engine"]) -> PlannedRun:
    """A run with a teacher as it is planned for GPUs."""
    assert run.teacher is not None
    precision = Precision(implementation=implementation)
    return replace(
        run, device="cuda", capability=(9, 0), precision=precision, teacher=replace(run.teacher, precision=precision)
    )


SPLIT: dict[str, Any] = {
    "tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2, "pipeline_model_parallel_size": 2,
    "use_distributed_optimizer": True,
}  # fmt: skip
IMPLEMENTATIONS: tuple[Literal["torch", "transformer_engine"], ...] = ("torch", "transformer_engine")
GPU_FORMS = {name: on_gpus(planned(8, (2, 1), **SPLIT), name) for name in IMPLEMENTATIONS}
"""Runs of which a GPU allocates something else than a CPU."""
