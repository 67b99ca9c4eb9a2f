"""A trained model of few layers as the beginning of a deeper one: its stack of layers, repeated (G_stack, arXiv 2405.15319).

The paper stacks the whole model: of n layers, layer i of the grown model is layer i mod n, and what belongs to no layer stays as it is.
Every number is copied bit for bit, one tensor of one layer at a time, whatever layout wrote the source. What the paper leaves to the
reader, and its authors' program answers: the optimizer's state is not grown. It begins anew, with its schedule, at step 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_salt.checkpoint import loading, safe_unpickle, save_directory
from megatron_salt.checkpoint.run_state import OpenedCheckpoint
from megatron_salt.checkpoint.state_file import model_of
from megatron_salt.config import ModelConfig
from megatron_salt.convert.checkpoint_writer import (
    STEP,
    Converted,
    refuse_existing,
    refuse_inside,
    whole_directory,
    write_checkpoint,
)
from megatron_salt.convert.import_checkpoint import recorded_losses, refuse_no_space
from megatron_salt.convert.megatron.arguments import ARCHITECTURE
from megatron_salt.convert.parts import EMBEDDING, parts_of, refuse_missing
from megatron_salt.convert.tensor_files import Piece, TensorFiles
from megatron_salt.convert.tensor_part import Part
from megatron_salt.errors import UserError
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.tokenizer.tokenizer import load_tokenizer

_OF_THE_MODEL = ("embedding", "decoder", "output_layer")
"""How the keys of the model's own tensors begin; the others belong to training."""


def grow_checkpoint(load: Path, num_layers: int, save: Path, overwrite: bool) -> None:
    """Make `save` of the checkpoint that `load` means. Raises UserError, and leaves nothing behind."""
    _refuse_present(save, overwrite)
    opened = loading.open_checkpoint(load, fallback=False)
    if opened is None:
        raise UserError(f"--load {load} holds no checkpoint")
    source, state = opened.directory, opened.state
    refuse_inside("--save", save, source)
    refuse_inside("--load", source, save)  # --overwrite would delete it
    model, ids, context = model_of(state.architecture), state.vocabulary_size, state.seq_length
    if ids is None or context is None:
        raise UserError(f"{source / save_directory.STATE}: its architecture lacks vocabulary or seq_length")
    _refuse_depth(num_layers, model, source)
    tensors = TensorFiles(source, safe_unpickle.read_metadata(source))
    _refuse_other_tensors(list(parts_of(ARCHITECTURE, model, ids, context)), model, tensors, source)
    grown = replace(model, num_layers=num_layers)
    pieces = [
        piece
        for part in parts_of(ARCHITECTURE, grown, ids, context)
        for piece in _pieces(tensors, part, num_layers, model.num_layers)
    ]
    refuse_no_space("--save", save, sum(piece.dtype.itemsize * math.prod(piece.shape) for piece in pieces))
    converted = Converted(
        model=grown,
        vocabulary_size=ids,
        context=context,
        dtype=tensors.sizes()[EMBEDDING][1],
        tokenizer=load_tokenizer(source / save_directory.TOKENIZER),
        event=_event(opened, model),
    )
    with whole_directory("--save", save, replaces=overwrite) as root:
        bar = ProgressBar(["tensors"], total=len(pieces), unit="tensors", log_interval=200)
        name = write_checkpoint(
            root,
            converted,
            pieces,
            lambda made, what: recorded_losses(made, what, None, str(source)),
            lambda _: bar.add(bar.done + 1, [1]),
        ).name
        print(bar.close())
    print(f"{save / name}: {num_layers} layers, {model.num_layers} of {source} repeated; --load {save} --finetune trains it on")


def _refuse_present(save: Path, overwrite: bool) -> None:
    """Raise UserError where there is something at `save` that may not be replaced."""
    if not overwrite or not save.is_dir() or save.is_symlink():
        refuse_existing("--save", save)
        return
    own = {save_directory.directory_of(save, STEP).name, save_directory.TRACKER}
    others = sorted(path.name for path in save.iterdir() if path.name not in own)
    if others:
        raise UserError(f"--save {save} holds {others[0]}, which this program did not write; --overwrite does not replace it")


def _refuse_depth(num_layers: int, model: ModelConfig, source: Path) -> None:
    if num_layers <= model.num_layers or num_layers % model.num_layers:
        raise UserError(
            f"--num-layers {num_layers} must be a multiple of the {model.num_layers} layers of {source}, such as "
            f"{2 * model.num_layers}"
        )


def _refuse_other_tensors(parts: Sequence[Part], model: ModelConfig, tensors: TensorFiles, source: Path) -> None:
    """Raise UserError where the source lacks a tensor of the model, or has one more, which the grown model would lack."""
    refuse_missing(parts, model.num_layers, tensors.sizes(), source)
    known = {part.key for part in parts}
    more = [key for key in sorted(tensors.sizes()) if key.split(".")[0] in _OF_THE_MODEL and "_extra_state" not in key]
    for key in more:
        if key not in known:
            raise UserError(f"{source}: {key} is no tensor of the model in its state.json, so it cannot be stacked")


def _event(opened: OpenedCheckpoint, model: ModelConfig) -> dict[str, object]:
    """What the grown checkpoint says of its source."""
    return {
        "event": "grow",
        "from": str(opened.directory),
        "checkpoint": loading.checkpoint_fingerprint(opened.directory),
        "step": opened.state.run.step,
        "num_layers": model.num_layers,
    }


def _pieces(tensors: TensorFiles, part: Part, num_layers: int, source_layers: int) -> Iterator[Piece]:
    """The pieces of a part of the grown model: one of a layer; of another tensor those in which the source holds it."""
    dtype = tensors.sizes()[part.key][1]
    zeros = tuple(0 for _ in part.shape)

    if part.layer is not None:
        shape = (1, *part.shape)
        load = partial(tensors.read, part.key, (part.layer % source_layers, *zeros), shape)
        size, offsets = (num_layers, *part.shape), (part.layer, *zeros)
        yield Piece(key=part.key, size=size, offsets=offsets, shape=shape, dtype=dtype, load=load)
        return
    for first, end in tensors.row_ranges(part.key):
        offsets, shape = (first, *zeros[1:]), (end - first, *part.shape[1:])
        load = partial(tensors.read, part.key, offsets, shape)
        yield Piece(key=part.key, size=part.shape, offsets=offsets, shape=shape, dtype=dtype, load=load)
