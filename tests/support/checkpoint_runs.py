"""A small run that saves and resumes, for the tests of checkpoints: called in every rank of `run_ranks`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_salt.checkpoint import integrity, save_directory, sharded_state
from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity, schedule_follows_run
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.config import CheckpointConfig, OptimizerConfig, ParallelConfig, TokenizerConfig
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.train.step import Student
from tests.support.small import GLOBAL_BATCH, SMALL, Case, build_student, train_student

TINY = replace(SMALL, num_layers=2, hidden_size=32, ffn_hidden_size=64)
DROPOUT = replace(TINY, hidden_dropout=0.1, attention_dropout=0.1)
SHARDED = ParallelConfig(use_distributed_optimizer=True)


@dataclass(frozen=True)
class Run:
    """The flags of one job."""

    save: str | None = None
    load: str | None = None
    parallel: ParallelConfig = SHARDED
    model: Any = TINY
    dtype: torch.dtype = torch.float32
    flags: dict[str, Any] = field(default_factory=dict)
    """Other leaves of CheckpointConfig."""
    data: str = "content:aaaa"
    tokenizer: str = "tokenizer:aaaa"
    seed: int = 1234

    @property
    def case(self) -> Case:
        return Case(parallel=self.parallel, model=self.model, dtype=self.dtype)


@dataclass(frozen=True)
class Left:
    """Hashes of what a job has in memory at its end. Jobs with the same hashes go on alike."""

    weights: str
    optimizer: str
    rng: str
    learning_rate: float
    progress: RunState | None
    """What `load` returned."""
    losses: list[float]


def start(run: Run, world_size: int) -> tuple[Student, Checkpointer, RunState | None]:
    """Build the model, and load the checkpoint that the run's flags name."""
    student = build_student(run.case, world_size, seed=run.seed)
    follows = schedule_follows_run(OptimizerConfig())
    identity = RunIdentity(
        yaml="seed: 1234\n", architecture=asdict(run.model), tokenizer_fingerprint=run.tokenizer, data_fingerprint=run.data,
        seed=run.seed, schedule_follows_run=follows,
    )  # fmt: skip
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    config = CheckpointConfig(save=run.save, load=run.load, **run.flags)
    checkpointer = Checkpointer(
        config, identity, tokenizer, student.mesh, chunks=student.chunks, optimizer=student.optimizer,
        scheduler=student.scheduler,
    )  # fmt: skip
    return student, checkpointer, checkpointer.load()


def job(run: Run, world_size: int, until: int, save_at: tuple[int, ...] = (), final: bool = False) -> Left:
    """Train to step `until`, saving on the way. Collective over all ranks."""
    student, checkpointer, progress = start(run, world_size)
    losses: list[float] = []
    for step in range(progress.step if progress else 0, until):
        losses += train_student(student, run.case, 1, step).losses
        checkpointer.poll()
        if step + 1 in save_at:
            checkpointer.save(at(step + 1), final=final)
    checkpointer.finish()
    return left(student, progress, losses)


def at(step: int) -> RunState:
    """The state of a run after a step."""
    samples = step * GLOBAL_BATCH
    events = ({"event": "start", "step": 0},)
    return RunState(step=step, consumed_samples=samples, position=samples, nonfinite_in_a_row=1, events=events)


def left(student: Student, progress: RunState | None, losses: list[float]) -> Left:
    """Hashes of everything on this rank that later steps depend on."""
    with sharded_state.settled(student.chunks):
        weights = _hash(param for chunk in student.chunks for _, param in sorted(chunk.named_parameters()))
    parts = student.optimizer.chained_optimizers
    moments = [moment for part in parts for state in part.optimizer.state.values() for _, moment in sorted(state.items())]
    mains = [param for part in parts for group in part.optimizer.param_groups for param in group["params"]]
    steps = torch.tensor([sharded_state.optimizer_step(student.optimizer)])
    state, generator = _hash([*moments, *mains, steps]), _hash([torch.get_rng_state()])
    return Left(weights, state, generator, student.learning_rate, progress, losses)


def _hash(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def flip(path: Path, offset: int) -> None:
    """Flip one bit of the byte at `offset`."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(bytes(content))


def rewrite(directory: Path, **changes: object) -> None:
    """Change values in a checkpoint's state.json, and its checksums with them; ... takes a value out."""
    state = json.loads((directory / save_directory.STATE).read_bytes()) | changes
    content = json.dumps({name: value for name, value in state.items() if value is not ...}).encode()
    sums = integrity.read_checksums(directory)
    integrity.write_checksums(
        directory, sums | {save_directory.STATE: integrity.write_summed(directory / save_directory.STATE, content)}
    )


def expect(error: type[Exception], action: Callable[[], Any]) -> str:
    """The message of the error that `action` must raise."""
    try:
        action()
    except error as caught:
        return str(caught)
    raise AssertionError(f"no {error.__name__}")
