"""From a checkpoint of ours to a directory that transformers loads. One process, on the CPU, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_salt import __version__
from megatron_salt.checkpoint import loading, safe_unpickle, save_directory
from megatron_salt.checkpoint.run_state import CheckpointState
from megatron_salt.checkpoint.state_file import model_of
from megatron_salt.convert.checkpoint_writer import refuse_existing, refuse_inside, whole_directory
from megatron_salt.convert.hugging_face.exported_config import config_of_model
from megatron_salt.convert.hugging_face.model_card import model_card
from megatron_salt.convert.hugging_face.safetensors_folder import CONFIG, INDEX, SINGLE
from megatron_salt.convert.hugging_face.safetensors_writer import safetensors_file
from megatron_salt.convert.hugging_face.tokenizer_files import bos_of_export, read_as_another, tokenizer_files
from megatron_salt.convert.import_weights import converted
from megatron_salt.convert.parts import parts_of, refuse_missing
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.convert.tensor_part import Part, Shape
from megatron_salt.errors import UserError
from megatron_salt.files import write_whole
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.tokenizer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class _Shard:
    """Tensors of one safetensors file: (part, number of the tensor in it, its name and shape)."""

    tensors: list[tuple[Part, int, str, Shape]]


def export_hugging_face(
    checkpoint: Path, out: Path, dtype: str, with_tokenizer: bool, prepend_bos: bool, shard_bytes: int
) -> None:
    """Make `out` of a checkpoint of any layout. Reads the weights alone. Raises UserError, and leaves nothing behind."""
    refuse_existing("OUT", out)
    opened = loading.open_checkpoint(checkpoint, fallback=False, flag_name="CHECKPOINT")
    if opened is None:
        raise UserError(f"CHECKPOINT {checkpoint} holds no checkpoint")
    refuse_inside("OUT", out, opened.directory)
    state = opened.state
    model = model_of(state.architecture)
    if state.vocabulary_size is None or state.seq_length is None:
        raise UserError(f"{opened.directory / save_directory.STATE}: its architecture lacks vocabulary or seq_length")
    config = config_of_model(model, state.vocabulary_size, state.seq_length, dtype)
    tokenizer = load_tokenizer(opened.directory / save_directory.TOKENIZER)
    files = tokenizer_files(tokenizer, opened.directory, state.seq_length, prepend_bos) if with_tokenizer else {}
    begin = bos_of_export(tokenizer, opened.directory) if prepend_bos else tokenizer.eod
    ends = {
        "eos_token_id": tokenizer.eod,
        "bos_token_id": begin,
    }  # where nothing begins a document, the end of the last one does
    config |= ends
    again = (
        {f"tokenizer/{name}": content for name, content in files.items()}
        if read_as_another(files, config["architectures"][0])
        else {}
    )
    parts = list(parts_of(config["architectures"][0], model, state.vocabulary_size, state.seq_length))
    tensors = TensorFiles(opened.directory, safe_unpickle.read_metadata(opened.directory))
    refuse_missing(parts, model.num_layers, tensors.sizes(), opened.directory)
    with whole_directory("OUT", out) as directory:
        _write_weights(directory, parts, tensors, getattr(torch, dtype), shard_bytes, str(opened.directory))
        _write_json(directory / CONFIG, config)
        _write_json(directory / "generation_config.json", ends | {"do_sample": True})
        for name, content in (*files.items(), *again.items()):
            (directory / name).parent.mkdir(exist_ok=True)
            write_whole(directory / name, content, durable=True)
        write_whole(directory / "README.md", model_card(opened.directory, state, config).encode(), durable=True)
    print(f"{out}: {config['architectures'][0]} in {dtype}, {_provenance(state)}; transformers loads it")
    if again:
        there = out / "tokenizer"
        print(
            f"{out}: transformers 5 gives a Qwen2 model the rules of Qwen2's tokenizer, and this is another one; load it from {there}, in "
            f"lm-eval: --model_args pretrained={out},tokenizer={there}"
        )


def _provenance(state: CheckpointState) -> str:
    return f"{state.run.step} steps, {state.run.consumed_samples} samples, megatron_salt {__version__}"


def _write_weights(
    directory: Path, parts: Sequence[Part], tensors: TensorFiles, dtype: torch.dtype, shard_bytes: int, where: str
) -> None:
    """The safetensors files, and their index where there are several. Memory: one tensor of the checkpoint, see `_rows`.

    where: names the checkpoint. Raises UserError where a number is not finite in the dtype.
    """
    shards = _shards(parts, dtype.itemsize, shard_bytes)
    names = (
        [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    bar = ProgressBar(["tensors"], total=sum(len(shard.tensors) for shard in shards), unit="tensors", log_interval=200)
    places: dict[str, str] = {}
    total = 0
    for file, shard in zip(names, shards, strict=True):
        shapes = {name: shape for _, _, name, shape in shard.tensors}
        with safetensors_file(directory / file, shapes, dtype) as write_rows:
            for part, group in groupby(shard.tensors, key=itemgetter(0)):
                wanted = {number: name for _, number, name, _ in group}
                for number, first, rows in _rows(part, tensors):
                    if number in wanted:
                        write_rows(wanted[number], first, converted(rows, dtype, part.key, where))
                bar.add(bar.done + len(wanted), [len(wanted)])
        total += sum(dtype.itemsize * torch.Size(shape).numel() for shape in shapes.values())
        places |= dict.fromkeys(shapes, file)
    print(bar.close())
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _shards(parts: Sequence[Part], itemsize: int, shard_bytes: int) -> list[_Shard]:
    """All tensors in their order, cut where a file would grow beyond `shard_bytes`. A larger tensor has a file of its own."""
    shards, size = [_Shard([])], 0
    for part in parts:
        for number, (name, shape) in enumerate(part.sources):
            nbytes = itemsize * torch.Size(shape).numel()
            if shards[-1].tensors and size + nbytes > shard_bytes:
                shards.append(_Shard([]))
                size = 0
            shards[-1].tensors.append((part, number, name, shape))
            size += nbytes
    return shards


def _rows(part: Part, tensors: TensorFiles) -> Iterator[tuple[int, int, Tensor]]:
    """(number of their tensor in the part, its first row, rows) of all of its rows. A vocabulary comes as it was saved, piece by piece."""
    if part.layer is not None:
        zeros = tuple(0 for _ in part.shape)
        whole = tensors.read(part.key, (part.layer, *zeros), (1, *part.shape))[0]
        yield from ((number, 0, tensor) for number, tensor in enumerate(part.split(whole)))
        return
    [(_, shape)] = part.sources
    for first, end in tensors.row_ranges(part.key):
        end = min(end, shape[0])  # what follows is our padding
        if first < end:
            yield 0, first, tensors.read(part.key, (first, *(0 for _ in shape[1:])), (end - first, *shape[1:]))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode(), durable=True)
