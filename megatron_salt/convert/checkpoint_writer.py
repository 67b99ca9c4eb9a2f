"""A checkpoint of this program's, written by one process from tensors that are made one at a time.

It is an ordinary one: a teacher, weights for --load --finetune, something to score, evaluate and generate with, under any layout. It
appears whole or not at all: everything is written to OUT.partial, which gets its name when the last byte is on the disk.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
from megatron_salt.files import real_path, sole_writer, sync
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
def whole_directory(flag_name: str, out: Path, replaces: bool = False) -> Iterator[Path]:
    """The name under which to fill a directory `out`; it gets its own name when the block ends. After an error nothing is left.

    replaces: a directory of that name makes room at the very end; until then, and after an error, it is as before. After a kill
    `out.partial` is left, or the old one as `out.replaced`; the next call removes them. Raises UserError where `out` exists or cannot be
    made, or another process is making it; the block's OSError gets a name of a file.
    """
    partial = out.with_name(out.name + ".partial")
    if not replaces:
        refuse_existing(flag_name, out)
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        with _empty_directory(flag_name, out, partial):
            yield partial
            sync(partial)
            if replaces:
                _make_room(out)
            refuse_existing(flag_name, out)
            partial.rename(out)
            sync(out.parent)
            if replaces:
                remove(_replaced(out))
    except BaseException as error:
        for parent in made:  # the deepest first; another process may use it
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(partial)) from error
        raise


def _replaced(out: Path) -> Path:
    return out.with_name(out.name + ".replaced")


def _make_room(out: Path) -> None:
    """Rename a directory of this name, if there is one."""
    if out.is_dir() and not out.is_symlink():
        remove(_replaced(out))
        out.rename(_replaced(out))


@contextmanager
def _empty_directory(flag_name: str, out: Path, partial: Path) -> Iterator[None]:
    """`partial` is an empty directory of this process alone; it is removed where the block raises. Raises UserError."""
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_writer(flag_name, out))
            remove(partial)
            partial.mkdir()
        except OSError as error:
            raise UserError(f"{flag_name} {out} cannot be made: {error.strerror}") from None
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                remove(partial)
            raise


def remove(path: Path) -> None:
    """Remove a directory with all that is in it, or a file, or a link and not what it names. Nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(flag_name: str, out: Path) -> None:
    """Raise UserError where there is something of this name already, or nothing can be made there."""
    try:
        exists = os.path.lexists(out)
        parent = next(parent for parent in out.absolute().parents if parent.exists())
    except OSError as error:
        raise UserError(f"{flag_name} {out} cannot be made: {error.strerror}") from None
    if exists:
        raise UserError(f"{flag_name} {out} exists; give a directory that does not, or remove it")
    if not parent.is_dir():
        raise UserError(f"{flag_name} {out} cannot be made: {parent} is not a directory")


def refuse_inside(flag_name: str, out: Path, source: Path) -> None:
    """Raise UserError where `out` lies in the directory that it is made of."""
    if real_path(out).is_relative_to(real_path(source)):
        raise UserError(f"{flag_name} {out} lies inside of {source}, which is read; give another directory")


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
