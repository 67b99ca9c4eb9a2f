"""From a checkpoint of ours to one that Megatron-LM loads. One process, on the CPU, one tensor at a time."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import torch

from megatron_salt.checkpoint import loading, safe_unpickle, save_directory
from megatron_salt.checkpoint.async_writer import CORE_CONFIG, CORE_CONFIG_CONTENT
from megatron_salt.checkpoint.state_file import model_of
from megatron_salt.convert.checkpoint_writer import refuse_existing, refuse_inside, whole_directory
from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.convert.import_weights import pieces_of
from megatron_salt.convert.megatron.arguments import ARCHITECTURE
from megatron_salt.convert.megatron.checkpoint_folder import TRACKER
from megatron_salt.convert.megatron.exported_arguments import args_of_model, flags_to_give
from megatron_salt.convert.megatron.weights import MegatronWeights
from megatron_salt.convert.tensor_files import TensorFiles, write_tensors
from megatron_salt.errors import UserError
from megatron_salt.files import sync, write_whole
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.tokenizer.tokenizer import load_tokenizer

RELEASE = "release"
"""Megatron-LM's directory of weights without a run: it starts at iteration 0, and looks neither for optimizer nor for random state."""
_VERSION = 3.0
"""Megatron-LM's checkpoint_version: the order of the rows of qkv weights."""


def export_megatron(checkpoint: Path, out: Path, dtype: str, with_tokenizer: bool) -> None:
    """Make `out` of a checkpoint of any layout. Reads the weights alone. Raises UserError, and leaves nothing behind."""
    refuse_existing("OUT", out)
    opened = loading.open_checkpoint(checkpoint, fallback=False, flag_name="CHECKPOINT")
    if opened is None:
        raise UserError(f"CHECKPOINT {checkpoint} holds no checkpoint")
    refuse_inside("OUT", out, opened.directory)
    state, source = opened.state, opened.directory
    model, ids, context = model_of(state.architecture), state.vocabulary_size, state.seq_length
    if ids is None or context is None:
        raise UserError(f"{source / save_directory.STATE}: its architecture lacks vocabulary or seq_length")
    args = args_of_model(model, ids, context)
    tokenizer = load_tokenizer(source / save_directory.TOKENIZER)
    args |= {"bf16": dtype == "bfloat16", "params_dtype": getattr(torch, dtype)}
    if tokenizer.kind != "ByteLevelTokenizer":  # the others have Megatron-LM's names
        args["tokenizer_type"] = tokenizer.kind
    foreign = ForeignModel(architecture=ARCHITECTURE, model=model, vocabulary_size=ids, context=context)
    weights = MegatronWeights(TensorFiles(source, safe_unpickle.read_metadata(source)), ids, str(source))
    pieces = pieces_of(weights, foreign, getattr(torch, dtype), str(source))
    with whole_directory("OUT", out) as root:
        directory = root / RELEASE
        directory.mkdir()
        bar = ProgressBar(["tensors"], total=len(pieces), unit="tensors", log_interval=200)
        write_tensors(directory, pieces, lambda _: bar.add(bar.done + 1, [1]))
        print(bar.close())
        common = {"args": argparse.Namespace(**args), "checkpoint_version": _VERSION, "iteration": 0}
        write_whole(directory / safe_unpickle.COMMON, _saved(common), durable=True)
        write_whole(directory / CORE_CONFIG, json.dumps(CORE_CONFIG_CONTENT).encode(), durable=True)
        sync(directory)
        if with_tokenizer:
            tokenizer.save(root / save_directory.TOKENIZER)
        write_whole(root / TRACKER, RELEASE.encode(), durable=True)
    rows = args["padded_vocab_size"]
    print(f"{out}: {ARCHITECTURE} in {dtype}, {state.run.step} steps; {rows} rows, of which {rows - ids} are padding and zero")
    given = " ".join(["--use-checkpoint-args", "--finetune", "--no-load-optim", "--no-load-rng", *flags_to_give(model)])
    print(f"Megatron-LM takes it with --load {out} {given} --dist-ckpt-strictness log_all")


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
