"""A model small enough to train in tests on every layout, and its batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import dist_checkpointing

from megatron_salt.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.model.gpt import build_model
from megatron_salt.model.loss import METRICS
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.train.build_model import build_optimizer, build_scheduler, install_pipeline_hooks, wrap_in_ddp
from megatron_salt.train.evaluate import means, sums_over_replicas
from megatron_salt.train.step import Student, train_step, unwrap

VOCABULARY = 250  # padded to 256, so that the last tensor-parallel rank owns ids that do not exist
GLOBAL_BATCH = 16
SEQ_LENGTH = 32

SMALL = ModelConfig(
    num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, num_query_groups=2, swiglu=True,
    normalization="RMSNorm", position_embedding_type="rope", disable_bias_linear=True,
)  # fmt: skip

_GPT2 = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4)  # LayerNorm, GELU, biases, learned positions, tied
MODELS = {
    "tied": SMALL,
    "untied": replace(SMALL, untie_embeddings_and_output_weights=True),
    "gpt2": _GPT2,
    # Squared ReLU, normed queries and keys, half of each head rotated, heads wider than hidden / heads, four groups of two heads.
    "squared relu": replace(
        SMALL, swiglu=False, squared_relu=True, qk_layernorm=True, rotary_percent=0.5, num_attention_heads=8, num_query_groups=4,
        kv_channels=16, untie_embeddings_and_output_weights=True,
    ),
    "layer-normed queries": replace(_GPT2, qk_layernorm=True, swiglu=True, num_query_groups=2, position_embedding_type="none"),
    # What other families of models add. Scaled frequencies: some of the 8 are kept, some divided, some between.
    "gpt-neox": replace(
        _GPT2, parallel_residual=True, position_embedding_type="rope", rotary_percent=0.25, untie_embeddings_and_output_weights=True
    ),
    "qwen2": replace(
        SMALL, add_qkv_bias=True, num_attention_heads=8, kv_channels=16, rope_scaling="llama3", rope_scaling_factor=3.0,
        rope_scaling_low_freq_factor=2.0, rope_scaling_high_freq_factor=6.0, rope_scaling_original_context=100,
    ),
    "gelu by tanh": replace(_GPT2, gelu_tanh=True, position_embedding_type="rope", rope_scaling="linear", rope_scaling_factor=2.5),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One way to run the small model."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = SMALL
    dtype: torch.dtype = torch.float32
    micro_batch_size: int = 2
    learning_rate: float = 3e-3
    documents: bool = False
    """Whether attention stays inside documents."""
    precision: Precision = TORCH
    adam_eps: float = 1e-8
    """1e-6 where several steps of two runs are compared that round differently: Adam makes a gradient that is nothing but rounding as
    large as any other, unless it is below this."""


def build_student(case: Case, world_size: int, weights: Path | None = None, seed: int = 1234) -> Student:
    """The student of a case, with weights from a checkpoint if one is named. Collective over all ranks."""
    mesh = make_student_mesh(student_layout(case.parallel, world_size), case.parallel.virtual_stages)
    seed_everything(seed, mesh)
    chunks = build_model(case.model, case.parallel, SEQ_LENGTH, VOCABULARY, case.dtype, 24, mesh, case.precision)
    ddp_chunks = wrap_in_ddp(chunks, case.parallel, mesh, case.precision)
    flags = OptimizerConfig(
        lr=case.learning_rate, weight_decay=0.1, adam_beta2=0.95, adam_eps=case.adam_eps, lr_decay_style="constant"
    )
    optimizer = build_optimizer(ddp_chunks, flags, case.parallel, case.dtype, mesh, case.precision)
    install_pipeline_hooks(ddp_chunks, optimizer, case.parallel.overlap_grad_reduce)
    scheduler = build_scheduler(optimizer, flags, train_samples=100 * GLOBAL_BATCH, global_batch_size=GLOBAL_BATCH)
    student = Student(
        chunks=ddp_chunks, optimizer=optimizer, scheduler=scheduler, mesh=mesh, seq_length=SEQ_LENGTH,
        micro_batch_size=case.micro_batch_size, global_batch_size=GLOBAL_BATCH,
    )  # fmt: skip
    if weights is not None:
        load_weights(student, weights)
    return student


def _model_state(student: Student) -> dict:
    states = [unwrap(chunk).sharded_state_dict() for chunk in student.chunks]
    return {"model": states[0]} if len(states) == 1 else {f"model{number}": state for number, state in enumerate(states)}


def save_weights(student: Student, directory: Path) -> None:
    """Write only the weights, in a form that loads under any layout."""
    dist_checkpointing.save(_model_state(student), str(directory))


def load_weights(student: Student, directory: Path) -> None:
    """Read what save_weights wrote."""
    loaded = dist_checkpointing.load(_model_state(student), str(directory))
    for chunk, state in zip(student.chunks, loaded.values(), strict=False):
        unwrap(chunk).load_state_dict(state)
    student.optimizer.reload_model_params()


def batch(student: Student, case: Case, step: int) -> list[Microbatch]:
    """This replica's microbatches of a step: tokens that can be learnt, very different masks, one microbatch without a valid token."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator) % 17 * 7 % VOCABULARY
    mask = (torch.rand(GLOBAL_BATCH, SEQ_LENGTH, generator=generator) > torch.linspace(0, 1, GLOBAL_BATCH)[:, None]).float()
    mask[2:4] = 0
    documents = (tokens[:, :-1] % 13 == 0).long().cumsum(1) if case.documents else None
    positions = torch.arange(SEQ_LENGTH).expand(GLOBAL_BATCH, -1)
    replicas, replica = student.mesh.layout.data, student.mesh.at.dp
    mine = range(replica * GLOBAL_BATCH // replicas, (replica + 1) * GLOBAL_BATCH // replicas, case.micro_batch_size)

    def rows(tensor: torch.Tensor, first: int) -> torch.Tensor:
        return tensor[first : first + case.micro_batch_size].contiguous()

    return [
        Microbatch(
            tokens=rows(tokens[:, :-1], first),
            labels=rows(tokens[:, 1:], first),
            loss_mask=rows(mask, first),
            position_ids=rows(positions, first),
            documents=None if documents is None else rows(documents, first),
            sample_ids=np.arange(first, first + case.micro_batch_size),
        )
        for first in mine
    ]


@dataclass(frozen=True)
class Curve:
    """Losses and gradient norms of a training, the same on every rank."""

    losses: list[float]
    grad_norms: list[float]


def train(case: Case, world_size: int, weights: Path | None = None, steps: int = 3) -> Curve:
    """Train the case for a few steps. Returns loss and gradient norm of each step. Collective over all ranks."""
    return train_student(build_student(case, world_size, weights), case, steps)


def train_student(student: Student, case: Case, steps: int, start: int = 0) -> Curve:
    """Train an existing student."""
    losses, grad_norms = [], []
    for step in range(start, start + steps):
        outcome = train_step(student, batch(student, case, step), PhaseTimer())
        sums = (
            torch.zeros(len(METRICS), dtype=torch.float64, device=current_device())
            if outcome.sums is None
            else outcome.sums.double().sum(0)
        )
        losses.append(means(sums_over_replicas(sums, student.mesh))["loss"])
        grad_norms.append(outcome.grad_norm)
    return Curve(losses, grad_norms)


def make_weights(case: Case, directory: Path) -> None:
    """Initial weights of a model, written by one rank."""
    directory.mkdir(parents=True, exist_ok=True)
    save_weights(build_student(replace(case, parallel=ParallelConfig()), 1), directory)
