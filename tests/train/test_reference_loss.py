"""A model's loss on the reference batch is right, the same under any layout, in every checkpoint, and changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_salt.checkpoint.loading import load_weights
from megatron_salt.checkpoint.run_state import ReferenceLosses
from megatron_salt.cli import parse
from megatron_salt.config import ParallelConfig
from megatron_salt.data.reference_batch import fixed_tokens
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.train.build_model import build_student as build_student_of_run
from megatron_salt.train.evaluate import reference_losses
from megatron_salt.train.plan import check
from megatron_salt.train.step import unwrap
from tests.support.program import DROPOUT, SEQ_LENGTH, argv, numbers, state_of, tensors, train, write_tokens
from tests.support.program import VOCABULARY as BYTES
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, VOCABULARY, Case, build_student, make_weights
from tests.support.small import SEQ_LENGTH as SMALL_LENGTH

OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReferenceLosses]:
    """Weights of the small model, and its losses on one rank."""
    weights = tmp_path_factory.mktemp("weights")
    run_ranks(1, make_weights, Case(), weights)
    return weights, run_ranks(1, probe_of, Case(), 1, weights)[0]


def probe_of(case: Case, world_size: int, weights: Path) -> ReferenceLosses:
    return reference_losses(build_student(case, world_size, weights), VOCABULARY)


@pytest.mark.parametrize("model", ["gpt2", "untied"])
def test_each_loss_is_that_of_a_context_no_longer_than_what_it_counts(model: str) -> None:
    """Oracle: full logits and torch's cross entropy over the first positions alone."""
    ((recorded, expected),) = run_ranks(1, probe_and_oracle, Case(model=MODELS[model]))
    assert recorded.lengths == (16, SMALL_LENGTH) and recorded.dtype == "float32"
    assert recorded.losses == pytest.approx(expected, abs=2e-6)


def probe_and_oracle(case: Case) -> tuple[ReferenceLosses, list[float]]:
    student = build_student(case, 1)
    recorded, losses = reference_losses(student, VOCABULARY), []
    model = unwrap(student.chunks[0]).eval()
    for number, length in enumerate(recorded.lengths):
        tokens = torch.from_numpy(fixed_tokens(VOCABULARY, number, length + 1))
        with torch.no_grad():
            hidden = model(tokens[None, :-1], torch.arange(length)[None], None)
            logits = model.logits(hidden)[:, 0, :VOCABULARY]
        losses.append(F.cross_entropy(logits, tokens[1:]).item())
    return recorded, losses


@pytest.mark.parametrize(
    "world_size, flags",
    [
        (2, dict(tensor_model_parallel_size=2)),
        (2, TP2),
        (2, PP2),
        (2, dict(PP2, num_virtual_stages_per_pipeline_rank=2)),
        (2, dict(context_parallel_size=2)),
        (2, OVERLAP),
        pytest.param(4, dict(TP2, **PP2, num_virtual_stages_per_pipeline_rank=2), marks=pytest.mark.full),
    ],
)
def test_every_layout_has_the_losses_of_one_rank_on_every_rank(
    one_rank: tuple[Path, ReferenceLosses], world_size: int, flags: dict[str, Any]
) -> None:
    weights, expected = one_rank
    found = run_ranks(world_size, probe_of, Case(parallel=ParallelConfig(**flags)), world_size, weights)
    assert found == [found[0]] * world_size
    assert found[0].lengths == expected.lengths and found[0].losses == pytest.approx(expected.losses, abs=1e-5)


@pytest.mark.parametrize(
    "world_size, flags", [(2, dict(TP2, **DROPOUT)), (2, dict(PP2, **DROPOUT, bf16=True)), (2, dict(OVERLAP, **DROPOUT))]
)
def test_a_run_that_saves_is_the_run_that_does_not(tmp_path: Path, data: str, world_size: int, flags: dict[str, Any]) -> None:
    """Every loss and gradient norm, and the last step's weights, optimizer and random state."""
    flags = dict(flags, data_path=data, train_iters=4)
    train(world_size, **flags, save=tmp_path / "every", save_interval=1)
    train(world_size, **flags, jsonl=tmp_path / "never" / "train.jsonl")
    train(world_size, **flags, save=tmp_path / "last")
    assert numbers(tmp_path / "every") == numbers(tmp_path / "never") == numbers(tmp_path / "last")
    assert tensors(tmp_path / "every", 4) == tensors(tmp_path / "last", 4)


@pytest.mark.parametrize("flags, tolerance", [(dict(bf16=True), 5e-3), ({}, 1e-5)])
def test_a_checkpoint_has_the_losses_it_recorded_wherever_its_weights_are_loaded(
    tmp_path: Path, data: str, flags: dict[str, Any], tolerance: float
) -> None:
    """The weights of another step have other losses."""
    flags = dict(flags, data_path=data, seq_length=2 * SEQ_LENGTH, train_iters=3)
    train(2, **flags, **TP2, lr=3e-2, save=tmp_path, save_interval=1)
    records = [state_of(tmp_path, step)["probe"] for step in (1, 3)]
    for record in records:
        assert record["lengths"] == [SEQ_LENGTH, 2 * SEQ_LENGTH] and record["dtype"] == (
            "bfloat16" if flags.get("bf16") else "float32"
        )
    assert all(abs(one - other) > 2 * tolerance for one, other in zip(*(record["losses"] for record in records), strict=True))
    (found,) = run_ranks(1, probe_of_checkpoint, argv(**flags), tmp_path / "iter_0000003")
    assert found.losses == pytest.approx(records[1]["losses"], abs=tolerance)


def probe_of_checkpoint(words: list[str], directory: Path) -> ReferenceLosses:
    config = parse(words)
    layout, plan = check(config, 1)
    mesh = make_student_mesh(layout)
    seed_everything(7, mesh)
    student = build_student_of_run(config, plan, BYTES, mesh)
    load_weights(directory, student.chunks, student.mesh)
    return reference_losses(student, BYTES)
