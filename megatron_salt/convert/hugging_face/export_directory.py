"""From a checkpoint of ours to a directory that transformers loads. One process, on the CPU, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_salt import __version__
from megatron_salt.checkpoint import loading, safe_unpickle, save_directory
from megatron_salt.checkpoint.run_state import CheckpointState
from megatron_salt.checkpoint.state_file import model_of
from megatron_salt.config import ModelConfig
from megatron_salt.convert.checkpoint_writer import refuse_existing, whole_directory
from megatron_salt.convert.hugging_face.exported_config import config_of_model
from megatron_salt.convert.hugging_face.model_card import model_card
from megatron_salt.convert.hugging_face.safetensors_folder import CONFIG, INDEX, SINGLE, safetensors_library
from megatron_salt.convert.hugging_face.tokenizer_files import bos_of_export, read_as_another, tokenizer_files
from megatron_salt.convert.parts import Part, Shape, parts_of
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.errors import UserError
from megatron_salt.files import sync, write_whole
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
    _refuse_missing(parts, model, tensors, opened.directory)
    with whole_directory("OUT", out) as directory:
        _write_weights(directory, parts, tensors, getattr(torch, dtype), shard_bytes)
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


def _refuse_missing(parts: Sequence[Part], model: ModelConfig, tensors: TensorFiles, directory: Path) -> None:
    """Raise UserError where the checkpoint lacks a tensor of the model, or has it in another shape."""
    sizes = tensors.sizes()
    for part in parts:
        wanted = part.shape if part.layer is None else (model.num_layers, *part.shape)
        saved = sizes.get(part.key, (None,))[0]
        if saved != wanted:
            there = "missing" if saved is None else str(list(saved))
            raise UserError(f"{directory}: {part.key} is {there}, and its state.json makes it {list(wanted)}")


def _write_weights(directory: Path, parts: Sequence[Part], tensors: TensorFiles, dtype: torch.dtype, shard_bytes: int) -> None:
    """The safetensors files, and their index where there are several. Memory: one file of them."""
    safetensors_library()
    from safetensors.torch import save_file

    shards = _shards(parts, dtype.itemsize, shard_bytes)
    names = (
        [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    bar = ProgressBar(["tensors"], total=sum(len(shard.tensors) for shard in shards), unit="tensors", log_interval=200)
    places: dict[str, str] = {}
    total = 0
    for file, shard in zip(names, shards, strict=True):
        contents = dict(_contents(shard, tensors, dtype))
        save_file(contents, directory / file, metadata={"format": "pt"})
        sync(directory / file)
        total += sum(tensor.nbytes for tensor in contents.values())
        places |= dict.fromkeys(contents, file)
        bar.add(bar.done + len(contents), [len(contents)])
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


def _contents(shard: _Shard, tensors: TensorFiles, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file. A part that gives several tensors is read once."""
    last: tuple[Part, Sequence[Tensor]] | None = None
    for part, number, name, shape in shard.tensors:
        if last is None or last[0] is not part:
            last = (part, part.split(_read(part, tensors)))
        tensor = last[1][number]
        assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
        yield name, tensor.to(dtype).clone().contiguous()


def _read(part: Part, tensors: TensorFiles) -> Tensor:
    zeros = tuple(0 for _ in part.shape)
    if part.layer is None:
        return tensors.read(part.key, zeros, part.shape)
    return tensors.read(part.key, (part.layer, *zeros), (1, *part.shape))[0]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode(), durable=True)
