"""From the tensors of another program to a checkpoint of ours. One process, on the CPU. The programs are the folders beside this."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from megatron_salt.checkpoint import safe_unpickle
from megatron_salt.checkpoint.run_state import ReferenceLosses
from megatron_salt.convert.checkpoint_writer import Converted, whole_directory, write_checkpoint
from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.convert.import_weights import Source, choose_dtype, pieces_of
from megatron_salt.convert.layer_by_layer import lengths_of, outputs_of_checkpoint
from megatron_salt.convert.tensor_files import Piece, TensorFiles
from megatron_salt.convert.verify import Outputs, refuse_other_outputs
from megatron_salt.errors import UserError
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.model.flops import num_parameters
from megatron_salt.parallel.launch import distributed, seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.tokenizer.tokenizer import Tokenizer

Witness = Callable[[torch.dtype, int, tuple[int, ...]], Outputs | None]
"""What transformers computes of the same source: with weights rounded to a dtype, over so many ids, on the reference batch of these
lengths. None: it is not installed."""


def write_imported(
    weights: Source, foreign: ForeignModel, out: Path, wanted: torch.dtype | None, tokenizer: Tokenizer, where: str,
    witness: Witness | None,
) -> None:  # fmt: skip
    """Make `out` of a source's tensors. where: names the source. witness: see there; None: nobody else computes its losses.

    Raises UserError, and leaves nothing behind.
    """
    dtype = choose_dtype(weights.dtypes(), wanted, where)
    pieces = pieces_of(weights, foreign, dtype, where)
    refuse_no_space("--to", out, sum(map(_bytes, pieces)))
    parameters = num_parameters(foreign.model, foreign.vocabulary_size, foreign.context)
    print(f"{where}: {foreign.architecture}, {parameters / 1e9:.3f}B parameters, context {foreign.context}; written in {dtype}")
    converted = Converted(
        model=foreign.model,
        vocabulary_size=foreign.vocabulary_size,
        context=foreign.context,
        dtype=dtype,
        tokenizer=tokenizer,
        event={"event": "import", "from": where, "architecture": foreign.architecture},
    )
    with whole_directory("--to", out) as directory:
        bar = ProgressBar(["tensors", "MB"], total=len(pieces), unit="tensors", log_interval=200)

        def done(piece: Piece) -> None:
            bar.add(bar.done + 1, [1, _bytes(piece) / 1e6])

        name = write_checkpoint(
            directory, converted, pieces, lambda made, what: recorded_losses(made, what, witness, where), done
        ).name
        print(bar.close())
    print(f"{out / name} is whole; --teacher-load {out} makes it a teacher")


def _bytes(piece: Piece) -> int:
    return piece.dtype.itemsize * math.prod(piece.shape)


def refuse_no_space(flag_name: str, out: Path, needed: int) -> None:
    """Raise UserError where the file system has not the room for `needed` bytes."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{flag_name} {out} needs {needed / 2**30:.2f} GiB, and {parent} has {free / 2**30:.2f} GiB free")


def recorded_losses(directory: Path, converted: Converted, witness: Witness | None, where: str) -> ReferenceLosses:
    """The losses of what was written, layer by layer; compared with those of transformers where it is installed."""
    tensors = TensorFiles(directory, safe_unpickle.read_metadata(directory))
    model, ids = converted.model, converted.vocabulary_size
    bar = ProgressBar(["layers"], total=model.num_layers, unit="layers", log_interval=10, label="losses: ")
    with distributed(timedelta(minutes=10), device="cpu"):
        mesh = make_student_mesh(Layout(tensor=1, context=1, data=1, pipeline=1))
        seed_everything(0, mesh)  # building a layer draws weights, which are then replaced
        own = outputs_of_checkpoint(tensors, model, ids, converted.context, mesh, lambda: bar.add(bar.done + 1, [1]))
    bar.close()
    lengths = lengths_of(converted.context)
    theirs = None if witness is None else witness(converted.dtype, ids, lengths)
    if theirs is not None:
        refuse_other_outputs(own, theirs, where)
    by = "this program alone" if theirs is None else "transformers and this program"
    why = " (transformers is not installed)" if theirs is None and witness is not None else ""
    print(f"loss on the reference batch: {own.losses[-1]:.5f} over {lengths[-1]} tokens, computed by {by}{why}")
    losses = tuple(loss if math.isfinite(loss) else None for loss in own.losses)
    return ReferenceLosses(lengths, losses, "float32", computed_by=by)
