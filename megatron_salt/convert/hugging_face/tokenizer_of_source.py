"""The tokenizer that lies beside a model's weights, and whether it belongs to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from megatron_salt.config import TokenizerConfig
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.document_ends import ends_of_post_processor
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer

Kind = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer"]

_KINDS: tuple[tuple[str, Kind], ...] = (
    ("tokenizer.json", "HuggingFaceTokenizer"),
    ("tokenizer.model", "SentencePieceTokenizer"),
    ("vocab.json", "GPT2BPETokenizer"),
)
"""The file by which a kind is known, the best first: tokenizer.json holds everything that the others hold."""


def tokenizer_of_source(config: TokenizerConfig, directory: Path) -> Tokenizer:
    """The tokenizer of the flags; without --tokenizer-type the one in `directory`. Raises UserError where there is none."""
    if config.tokenizer_type is not None:
        return build_tokenizer(config)
    for name, kind in _KINDS:
        if (directory / name).is_file():
            files = {"vocab_file": str(directory / "vocab.json"), "merge_file": str(directory / "merges.txt")}
            if kind != "GPT2BPETokenizer":
                files = {"tokenizer_model": str(directory if kind == "HuggingFaceTokenizer" else directory / name)}
            return build_tokenizer(TokenizerConfig(tokenizer_type=kind, eod_token=config.eod_token, **files))
    names = ", ".join(name for name, _ in _KINDS)
    raise UserError(f"{directory} holds no tokenizer ({names}); give --tokenizer-type and --tokenizer-model")


def note_on_bos(tokenizer: Tokenizer, where: str) -> str | None:
    """What to tell the user of a tokenizer.json that puts a token before each text; None where it puts none, or is of another kind."""
    if tokenizer.kind != "HuggingFaceTokenizer" or tokenizer.bos is None:
        return None
    declared = ends_of_post_processor(json.loads(tokenizer.files["tokenizer.json"]).get("post_processor"))
    if tokenizer.bos not in declared.bos:
        return None
    name = next((repr(name) for name, i in tokenizer.special.items() if i == tokenizer.bos), f"id {tokenizer.bos}")
    return f"{where}: its tokenizer begins a text with {name}, as its training did; prepare data for it with --prepend-bos"


def refuse_foreign_ids(tokenizer: Tokenizer, vocabulary_size: int, where: str) -> None:
    """Raise UserError where the tokenizer has ids that the model's embedding has no row for."""
    if tokenizer.vocabulary_size > vocabulary_size:
        raise UserError(
            f"{where}: the model has rows for {vocabulary_size} ids, and the tokenizer has {tokenizer.vocabulary_size}; "
            "it is another model's tokenizer"
        )
