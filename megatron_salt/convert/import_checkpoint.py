"""From a directory of another program to a checkpoint of ours. One process, on the CPU."""

from __future__ import annotations

import math
import shutil
from datetime import timedelta
from pathlib import Path

import torch

from megatron_salt.checkpoint import safe_unpickle
from megatron_salt.checkpoint.run_state import ReferenceLosses
from megatron_salt.config import TokenizerConfig
from megatron_salt.convert.checkpoint_writer import Converted, refuse_existing, whole_directory, write_checkpoint
from megatron_salt.convert.families import ForeignModel, model_of_config
from megatron_salt.convert.import_weights import Source, choose_dtype, pieces_of
from megatron_salt.convert.layer_by_layer import lengths_of, outputs_of_checkpoint
from megatron_salt.convert.safetensors_folder import CONFIG, SafetensorsFolder, read_config
from megatron_salt.convert.tensor_files import Piece, TensorFiles
from megatron_salt.convert.tokenizer_of_source import refuse_foreign_ids, tokenizer_of_source
from megatron_salt.convert.verify import outputs_of_transformers, refuse_other_outputs
from megatron_salt.errors import UserError
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.model.flops import num_parameters
from megatron_salt.parallel.launch import distributed, seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.tokenizer.tokenizer import Tokenizer


def import_hugging_face(source: Path, out: Path, dtype: str | None, tokenizer: TokenizerConfig, verify: bool) -> None:
    """Make `out`, a directory of checkpoints with one checkpoint, of a directory of transformers.

    dtype: "float32" or "bfloat16"; None: the source's own. Raises UserError, and leaves nothing behind.
    """
    refuse_existing("--to", out)
    if not source.is_dir():
        raise UserError(f"{source} is not a directory; give one that save_pretrained wrote, or a clone of a model")
    where = str(source / CONFIG)
    foreign = model_of_config(read_config(source), where)
    vocabulary = tokenizer_of_source(tokenizer, source)
    refuse_foreign_ids(vocabulary, foreign.vocabulary_size, str(source))
    for note in foreign.notes:
        print(note)
    checked = source if verify else None
    write_imported(
        SafetensorsFolder(source), foreign, out, getattr(torch, dtype) if dtype else None, vocabulary, str(source), checked
    )


def write_imported(
    weights: Source, foreign: ForeignModel, out: Path, wanted: torch.dtype | None, tokenizer: Tokenizer, where: str, checked: Path | None,
) -> None:  # fmt: skip
    """Make `out` of a source's tensors. where: names the source. checked: a directory whose losses transformers computes; None: nobody.

    Raises UserError, and leaves nothing behind.
    """
    dtype = choose_dtype(weights.dtypes(), wanted, where)
    pieces = pieces_of(weights, foreign, dtype, where)
    refuse_no_space(out, sum(map(_bytes, pieces)))
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

        name = write_checkpoint(directory, converted, pieces, lambda made, what: _losses(made, what, checked), done).name
        print(bar.close())
    print(f"{out / name} is whole; --teacher-load {out} makes it a teacher")


def _bytes(piece: Piece) -> int:
    return piece.dtype.itemsize * math.prod(piece.shape)


def refuse_no_space(out: Path, needed: int) -> None:
    """Raise UserError where the file system has not the room for `needed` bytes."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"--to {out} needs {needed / 2**30:.2f} GiB, and {parent} has {free / 2**30:.2f} GiB free")


def _losses(directory: Path, converted: Converted, checked: Path | None) -> ReferenceLosses:
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
    theirs = None if checked is None else outputs_of_transformers(checked, converted.dtype, ids, lengths)
    if theirs is not None:
        refuse_other_outputs(own, theirs, str(checked))
    by = "this program alone" if theirs is None else "transformers and this program"
    why = " (transformers is not installed)" if theirs is None and checked is not None else ""
    print(f"loss on the reference batch: {own.losses[-1]:.5f} over {lengths[-1]} tokens, computed by {by}{why}")
    return ReferenceLosses(lengths, tuple(loss if math.isfinite(loss) else None for loss in own.losses), "float32")
