"""From a GGUF file of llama.cpp to a checkpoint of ours. One process, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_salt.config import TokenizerConfig
from megatron_salt.convert.checkpoint_writer import refuse_existing
from megatron_salt.convert.gguf.architectures import ROPE_FACTORS, config_of_metadata
from megatron_salt.convert.gguf.gguf_file import GgufFile
from megatron_salt.convert.gguf.tokenizer_of_file import tokenizer_of_file
from megatron_salt.convert.gguf.weights import GgufWeights
from megatron_salt.convert.hugging_face.families import model_of_config
from megatron_salt.convert.hugging_face.tokenizer_of_source import refuse_foreign_ids
from megatron_salt.convert.hugging_face.transformers_process import GgufSource, outputs_of_transformers
from megatron_salt.convert.import_checkpoint import Witness, write_imported
from megatron_salt.tokenizer.tokenizer import build_tokenizer

_ROWS = 4096
_NO_WITNESS = ("gptneox",)
"""Architectures whose GGUF files transformers cannot read."""


def import_gguf(source: Path, out: Path, dtype: str | None, tokenizer: TokenizerConfig, verify: bool) -> None:
    """Make `out`, a directory of checkpoints with one checkpoint, of a GGUF file.

    dtype: "float32" or "bfloat16"; None: the file's own, where a quantised tensor counts as float32. Raises UserError, and leaves
    nothing behind.
    """
    refuse_existing("--to", out)
    file = GgufFile(source)
    where = str(source)
    tied = output_is_embedding(file)
    divisors = file.read(ROPE_FACTORS).float().numpy() if ROPE_FACTORS in file.tensors else None
    shapes = {name: stored.shape for name, stored in file.tensors.items()}
    said = config_of_metadata(file.metadata, shapes, divisors, tied, where)
    foreign = model_of_config(said.config, where)
    weights = GgufWeights(file, foreign, tied)
    if tokenizer.tokenizer_type is None:
        vocabulary = tokenizer_of_file(file.metadata, tokenizer.eod_token, where)
    else:
        vocabulary = build_tokenizer(tokenizer)
    refuse_foreign_ids(vocabulary, foreign.vocabulary_size, where)
    for note in (*said.notes, *foreign.notes, *_notes(file)):
        print(note)
    witness: Witness | None = None
    if verify and file.metadata["general.architecture"] not in _NO_WITNESS:
        witness = partial(outputs_of_transformers, GgufSource(source, said.not_in_transformers))
    write_imported(weights, foreign, out, getattr(torch, dtype) if dtype else None, vocabulary, where, witness)


def output_is_embedding(file: GgufFile) -> bool:
    """Whether the output weight is the embedding: there is none of its own, or it is a copy, number by number."""
    embedding, output = (file.tensors.get(name) for name in ("token_embd.weight", "output.weight"))
    if embedding is None or output is None:
        return output is None
    if embedding.shape != output.shape:
        return False
    return all(
        torch.equal(file.read("token_embd.weight", rows), file.read("output.weight", rows)) for rows in _slices(output.shape[0])
    )


def _slices(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))


def _notes(file: GgufFile) -> Iterator[str]:
    quantised = file.quantised()
    if quantised:
        counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(quantised.items()))
        yield f"{file.path}: quantised tensors become the float32 numbers that they stand for: {counts}"
    if file.metadata["general.architecture"] in _NO_WITNESS:
        yield f"{file.path}: transformers does not read GGUF files of GPT-NeoX, so nothing else computes its losses"
