"""From a torch_dist checkpoint of Megatron-LM or Megatron-Bridge to one of ours. One process, on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_salt.checkpoint.safe_unpickle import COMMON
from megatron_salt.config import TokenizerConfig
from megatron_salt.convert.checkpoint_writer import refuse_existing, refuse_inside
from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.convert.import_checkpoint import write_imported
from megatron_salt.convert.megatron.arguments import model_of_args, model_of_provider
from megatron_salt.convert.megatron.checkpoint_folder import RUN_CONFIG, MegatronFolder, open_folder
from megatron_salt.convert.megatron.weights import MegatronWeights
from megatron_salt.convert.parts import EMBEDDING
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.tokenizer import build_tokenizer


def import_megatron(source: Path, out: Path, dtype: str | None, tokenizer: TokenizerConfig) -> None:
    """Make `out`, a directory of checkpoints with one checkpoint, of a checkpoint of megatron-core.

    dtype: "float32" or "bfloat16"; None: the source's own. Raises UserError, and leaves nothing behind.
    """
    refuse_existing("--to", out)
    if tokenizer.tokenizer_type is None:
        raise UserError(
            "--from megatron needs --tokenizer-type: a checkpoint of Megatron holds no tokenizer, and its rows beyond the ids are padding"
        )
    folder = open_folder(source)
    refuse_inside("--to", out, folder.directory)
    vocabulary = build_tokenizer(tokenizer)
    ids = vocabulary.vocabulary_size
    foreign = _model_of(folder, ids)
    weights = MegatronWeights(folder.tensors, ids, str(folder.directory))
    if weights.layers() != foreign.model.num_layers:
        raise UserError(f"{folder.directory}: num_layers is {foreign.model.num_layers}, and it holds {weights.layers()} layers")
    _tell_padding(weights, ids, folder)
    for note in foreign.notes:
        print(f"{folder.directory}: {note}")
    write_imported(weights, foreign, out, getattr(torch, dtype) if dtype else None, vocabulary, str(folder.directory), None)


def _model_of(folder: MegatronFolder, ids: int) -> ForeignModel:
    if folder.arguments is not None:
        return model_of_args(folder.arguments, ids, f"{folder.directory} (args)")
    if folder.provider is not None:
        return model_of_provider(folder.provider, ids, str(folder.directory / RUN_CONFIG))
    raise UserError(
        f"{folder.directory} does not say which model it holds: there are no args, neither in {COMMON} nor in the shards, and no "
        f"{RUN_CONFIG}"
    )


def _tell_padding(weights: MegatronWeights, ids: int, folder: MegatronFolder) -> None:
    """Print which rows of the vocabulary stay behind. Raises UserError where the model has fewer rows than the tokenizer has ids."""
    rows = weights.rows()
    if rows == 0:
        raise UserError(f"{folder.directory}: {EMBEDDING} is missing: it holds no GPTModel")
    if rows < ids:
        raise UserError(
            f"{folder.directory}: the model has rows for {rows} ids, and the tokenizer has {ids}; it is another model's tokenizer"
        )
    if rows == ids:
        return
    print(
        f"{folder.directory}: rows {ids} to {rows - 1} of {rows} are taken for padding and cut: the tokenizer has {ids} ids. "
        "Megatron's own loss counts them in its softmax"
    )
    described = folder.arguments if folder.arguments is not None else folder.provider or {}
    multiple, tp = described.get("make_vocab_size_divisible_by"), described.get("tensor_model_parallel_size")
    if type(multiple) is int and type(tp) is int and multiple * tp > 0 and rows != -(-ids // (multiple * tp)) * multiple * tp:
        print(
            f"{folder.directory}: warning: {ids} ids padded to a multiple of make_vocab_size_divisible_by {multiple} x "
            f"tensor_model_parallel_size {tp} are {-(-ids // (multiple * tp)) * multiple * tp} rows, not {rows}; is it this tokenizer?"
        )
