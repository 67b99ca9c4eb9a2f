"""From a directory of Hugging Face's transformers to a checkpoint of ours. One process, on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_salt.config import TokenizerConfig
from megatron_salt.convert.checkpoint_writer import refuse_existing, refuse_inside
from megatron_salt.convert.hugging_face.families import model_of_config
from megatron_salt.convert.hugging_face.safetensors_folder import CONFIG, SafetensorsFolder, read_config
from megatron_salt.convert.hugging_face.tokenizer_of_source import note_on_bos, refuse_foreign_ids, tokenizer_of_source
from megatron_salt.convert.hugging_face.transformers_process import outputs_of_transformers
from megatron_salt.convert.import_checkpoint import write_imported
from megatron_salt.errors import UserError


def import_hugging_face(source: Path, out: Path, dtype: str | None, tokenizer: TokenizerConfig, verify: bool) -> None:
    """Make `out`, a directory of checkpoints with one checkpoint, of a directory of transformers.

    dtype: "float32" or "bfloat16"; None: the source's own. Raises UserError, and leaves nothing behind.
    """
    refuse_existing("--to", out)
    if not source.is_dir():
        raise UserError(f"{source} is not a directory; give one that save_pretrained wrote, or a clone of a model")
    refuse_inside("--to", out, source)
    where = str(source / CONFIG)
    foreign = model_of_config(read_config(source), where)
    vocabulary = tokenizer_of_source(tokenizer, source)
    refuse_foreign_ids(vocabulary, foreign.vocabulary_size, str(source))
    for note in (*foreign.notes, note_on_bos(vocabulary, str(source))):
        if note is not None:
            print(note)
    witness = partial(outputs_of_transformers, source) if verify else None
    write_imported(
        SafetensorsFolder(source), foreign, out, getattr(torch, dtype) if dtype else None, vocabulary, str(source), witness
    )
