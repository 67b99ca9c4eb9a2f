"""Open models in, trained models out: checkpoints of Hugging Face, Megatron-LM and llama.cpp as checkpoints of ours, and back.

    python tools/convert_checkpoint.py import SmolLM2-1.7B --to teachers/smollm2
    python tools/convert_checkpoint.py import --from gguf smollm2.gguf --to teachers/smollm2
    python tools/convert_checkpoint.py export runs/salt exported/salt
    python tools/convert_checkpoint.py export runs/salt exported/megatron --to megatron

An imported model is an ordinary checkpoint, under any layout: a teacher for --teacher-load, weights for --load --finetune, a model to
score, evaluate and generate with. One process, on the CPU. Memory is bounded by the largest tensor, not by the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_salt.cli import exit_status, run_tool
from megatron_salt.config import TokenizerConfig
from megatron_salt.errors import UserError, did_you_mean

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ImportConfig:
    """Make a checkpoint of a model that another program trained."""

    source: tyro.conf.Positional[str]
    """The model. hf: a directory with config.json, safetensors, and the files of its tokenizer. gguf: one .gguf file."""

    to: str
    """Directory of checkpoints to make. It must not exist."""

    from_: Annotated[Literal["hf", "megatron", "gguf"], tyro.conf.arg(name="from")] = "hf"
    """What the source is. hf: a directory of Hugging Face's transformers. megatron: a torch_dist checkpoint of Megatron-LM or
    Megatron-Bridge, or a directory of such checkpoints. gguf: a file of llama.cpp."""

    dtype: Dtype | None = None
    """Dtype of the checkpoint. Default: the source's, which must then be float32 or bfloat16 throughout."""

    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "ByteLevelTokenizer"] | None
    ) = None
    """Kind of the model's tokenizer. Default: the one that lies in the source; --from megatron needs it."""

    tokenizer_model: str | None = None
    """SentencePiece model file, or tokenizer.json of Hugging Face."""

    vocab_file: str | None = None
    """Vocabulary of GPT-2 (encoder.json)."""

    merge_file: str | None = None
    """Merges of GPT-2 (vocab.bpe)."""

    eod_token: str | None = None
    """Text of the token that ends documents. Needed where the tokenizer has several such tokens."""

    verify: bool = True
    """hf: compare logits and losses with those of transformers, where it is installed. Needs the memory of the whole model in float32."""

    def tokenizer(self) -> TokenizerConfig:
        """The tokenizer's flags."""
        return TokenizerConfig(
            tokenizer_type=self.tokenizer_type,
            tokenizer_model=self.tokenizer_model,
            vocab_file=self.vocab_file,
            merge_file=self.merge_file,
            eod_token=self.eod_token,
        )


@dataclass(frozen=True)
class ExportConfig:
    """Make a directory that another program reads, of a checkpoint of ours."""

    checkpoint: tyro.conf.Positional[str]
    """Directory of checkpoints, of which the latest is used, or one iter_* directory."""

    out: tyro.conf.Positional[str]
    """Directory to make. It must not exist."""

    to: Literal["hf", "megatron"] = "hf"
    """What to make. hf: a directory of Hugging Face's transformers. megatron: a torch_dist checkpoint for Megatron-LM's --load."""

    dtype: Dtype = "bfloat16"
    """Dtype of the weights."""

    tokenizer: bool = True
    """Write the tokenizer's files. Plain bytes have none: --no-tokenizer."""

    prepend_bos: bool = False
    """Have the tokenizer begin a text with the beginning-of-sequence id, as preprocess_data.py --prepend-bos does."""

    max_shard_gb: float = 5.0
    """hf: largest safetensors file, in GB."""

    def __post_init__(self) -> None:
        if not 0.001 <= self.max_shard_gb <= 1000:
            raise UserError(f"--max-shard-gb must lie in [0.001, 1000], got {self.max_shard_gb}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command in _COMMANDS:
        return _COMMANDS[command](rest)
    if command in ("-h", "--help"):
        print(
            f"usage: {Path(sys.argv[0]).name} [-h] {{import,export}} ...\n\n{__doc__}\nimport and export have a --help of their own."
        )
        return 0

    def refuse() -> int:
        given = f"{command!r} is no command" if command else "no command is given"
        if command.startswith("--"):
            raise UserError(f"unknown flag {command}; give import or export first, each has a --help")
        raise UserError(f"{given}{did_you_mean(command, _COMMANDS)}; give import or export, each has a --help")

    return exit_status(refuse)


def _import(argv: Sequence[str]) -> int:
    return run_tool(ImportConfig, import_checkpoint, argv)


def _export(argv: Sequence[str]) -> int:
    return run_tool(ExportConfig, export_checkpoint, argv)


_COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {"import": _import, "export": _export}


def import_checkpoint(config: ImportConfig) -> None:
    """Write the checkpoint. Raises UserError."""
    if config.from_ == "gguf":
        from megatron_salt.convert.gguf.import_file import import_gguf

        import_gguf(Path(config.source), Path(config.to), config.dtype, config.tokenizer(), config.verify)
        return
    if config.from_ == "megatron":
        from megatron_salt.convert.megatron.import_torch_dist import import_megatron

        import_megatron(Path(config.source), Path(config.to), config.dtype, config.tokenizer())
        return
    from megatron_salt.convert.hugging_face.import_directory import import_hugging_face

    import_hugging_face(Path(config.source), Path(config.to), config.dtype, config.tokenizer(), config.verify)


def export_checkpoint(config: ExportConfig) -> None:
    """Write the directory. Raises UserError."""
    if config.to == "megatron":
        from megatron_salt.convert.megatron.export_torch_dist import export_megatron

        export_megatron(Path(config.checkpoint), Path(config.out), config.dtype, config.tokenizer)
        return
    from megatron_salt.convert.hugging_face.export_directory import export_hugging_face

    export_hugging_face(
        Path(config.checkpoint),
        Path(config.out),
        config.dtype,
        config.tokenizer,
        config.prepend_bos,
        int(config.max_shard_gb * 1e9),
    )
