"""Datasets and their tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import representable, within
from megatron_salt.errors import UserError

NAMED_SETS = ("valid_data_path",)
"""Fields of words that may name sets; YAML may have {NAME: prefix or [weight, prefix, ...]} there."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and held-out data, and how documents are masked."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs, or pairs of weight and prefix: `0.7 web 0.3 code`.
    Without weights every window of every dataset is visited once an epoch."""

    valid_data_path: tuple[str, ...] = ()
    """Held-out data, in the same form as --data-path; or several named sets, NAME=PREFIX each: `prose=p code=q`.
    A set may be a blend: `prose=0.7 p 0.3 q`. Each set is evaluated and logged by itself.
    A path whose first part has an equals sign is written ./a=b."""

    valid_share: float = 0.0
    """Share of each dataset that is held out from training: its last windows. Only without --valid-data-path."""

    allow_valid_in_train: bool = False
    """Allow a --valid-data-path with data of a --data-path: the same file, a copy, or made of the same text."""

    eod_mask_loss: bool = False
    """Compute no loss where the input token is the end-of-document id."""

    reset_position_ids: bool = False
    """Restart positions after each end-of-document id."""

    reset_attention_mask: bool = False
    """Let tokens attend only to their own document."""

    verify_data: bool = False
    """Hash every byte of the data at start, instead of a fixed sample of blocks.
    This changes the fingerprint of data without a manifest: use it from the first start of a run, or never."""

    allow_duplicate_inputs: bool = False
    """Allow datasets with the same data: one under two names, a copy, or two made of one file.
    Each then counts as a dataset of its own."""

    def __post_init__(self) -> None:
        within(self, 0.0, 0.5, "valid_share")
        representable(self)
        if self.valid_share and self.valid_data_path:
            raise UserError(
                f"--valid-share {self.valid_share} and --valid-data-path {' '.join(self.valid_data_path)} both name held-out data; give one"
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that turned text into ids."""

    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "ByteLevelTokenizer"] | None
    ) = None
    """Kind of tokenizer. A tool that turns text into ids needs it.
    Default: the one that the dataset's manifest or the checkpoint names."""

    tokenizer_model: str | None = None
    """SentencePiece model file, or tokenizer.json of Hugging Face."""

    vocab_file: str | None = None
    """Vocabulary of GPT-2 (encoder.json)."""

    merge_file: str | None = None
    """Merges of GPT-2 (vocab.bpe)."""

    eod_token: str | None = None
    """Text of the token that ends documents. Needed where the tokenizer has several such tokens.
    Default: the special token whose name or declaration says so."""
