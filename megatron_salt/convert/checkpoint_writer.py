"""A checkpoint of this program's, written by one process from tensors that are made one at a time.

It is an ordinary one: a teacher, weights for --load --finetune, something to score, evaluate and generate with, under any layout. It
appears whole or not at all: everything is written to OUT.partial, which gets its name when the last byte is on the disk.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_salt.checkpoint import async_writer, integrity, retention, save_directory, state_file
from megatron_salt.checkpoint.run_state import CheckpointState, ReferenceLosses, RunState
from megatron_salt.config import ModelConfig, RunConfig, TrainingConfig
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.convert.tensor_files import Piece, write_tensors
from megatron_salt.errors import UserError
from megatron_salt.files import sync
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mcore_compat import megatron_core_version
from megatron_salt.tokenizer.tokenizer import Tokenizer

STEP = 0
"""A converted checkpoint is at step 0 of a run that has not begun."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a converted checkpoint says beside tensors."""

    model: ModelConfig
    vocabulary_size: int
    """Ids in its softmax."""
    context: int
    """Longest sequence, in tokens."""
    dtype: torch.dtype
    tokenizer: Tokenizer
    event: dict[str, Any]
    """Where it comes from, for people: JSON values."""


@contextmanager
def whole_directory(flag_name: str, out: Path) -> Iterator[Path]:
    """The name under which to fill a directory `out`; it gets its own name when the block ends. After an error nothing is left.

    Raises UserError where `out` exists.
    """
    partial = out.with_name(out.name + ".partial")
    refuse_existing(flag_name, out)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync(partial)
        refuse_existing(flag_name, out)
        partial.rename(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(flag_name: str, out: Path) -> None:
    """Raise UserError where there is something of this name already."""
    if out.is_symlink() or out.exists():
        raise UserError(f"{flag_name} {out} exists; give a directory that does not, or remove it")


def write_checkpoint(
    root: Path,
    converted: Converted,
    pieces: Iterable[Piece],
    losses: Callable[[Path, Converted], ReferenceLosses],
    done: Callable[[Piece], None],
) -> Path:
    """Write the checkpoint into `root`, a directory of checkpoints; returns its own directory. Needs no ranks.

    losses: called with the directory of the tensors, for the losses by which a run recognises the model as its teacher. done: called
    after each piece. Raises OSError, and what `pieces` and `losses` raise.
    """
    directory = save_directory.partial_of(root, STEP)
    directory.mkdir(parents=True)
    shards = write_tensors(directory, list(pieces), done)
    sums = async_writer.write_core_files(directory)
    for name in (*shards, integrity.METADATA):
        sums[name] = integrity.sum_of_file(directory / name)
    converted.tokenizer.save(directory / save_directory.TOKENIZER)
    for path in sorted((directory / save_directory.TOKENIZER).iterdir()):
        sums[f"{save_directory.TOKENIZER}/{path.name}"] = integrity.sum_of_file(path)
    yaml = to_yaml(run_config(converted))
    sums[save_directory.RUN_YAML] = integrity.write_summed(directory / save_directory.RUN_YAML, yaml.encode())
    state = checkpoint_state(converted, losses(directory, converted))
    sums[save_directory.STATE] = state_file.write_state(directory, state)
    integrity.write_checksums(directory, sums)
    return save_directory.publish(root, STEP)


def run_config(converted: Converted) -> RunConfig:
    """The configuration that the checkpoint records: the model, its context and its dtype."""
    training = TrainingConfig(seq_length=converted.context, bf16=converted.dtype == torch.bfloat16)
    return RunConfig(model=converted.model, training=training)


def checkpoint_state(converted: Converted, losses: ReferenceLosses) -> CheckpointState:
    """state.json of a checkpoint that no run wrote."""
    return CheckpointState(
        name="converted",
        saved_at=time.time(),
        lineage=retention.fresh(),
        megatron_core=megatron_core_version(),
        torch=torch.__version__,
        run=RunState(events=(converted.event,)),
        architecture=asdict(converted.model) | {"seq_length": converted.context, "vocabulary": converted.vocabulary_size},
        tokenizer=converted.tokenizer.fingerprint,
        data_fingerprint="none: the checkpoint was converted",
        reference_losses=losses,
        layout=Layout(tensor=1, context=1, data=1, pipeline=1),
        chunks=1,
        rng=[],
        scheduler=None,
        optimizer=None,
    )
