"""Datasets and their tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import representable, within
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, cut and masked how."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs, or weight prefix pairs: `0.7 web 0.3 code`.
    Without weights every window of every dataset is visited once an epoch."""

    valid_data_path: tuple[str, ...] = ()
    """Held-out data, in the same form as --data-path."""

    valid_share: float = 0.0
    """Share of each dataset's last windows that is held out from training when there is no --valid-data-path."""

    allow_valid_in_train: bool = False
    """Take a --valid-data-path that holds the data of a --data-path, in the same file, as a copy, or made of the same text."""

    eod_mask_loss: bool = False
    """No loss where the input token is the end-of-document id."""

    reset_position_ids: bool = False
    """Positions start again after each end-of-document id."""

    reset_attention_mask: bool = False
    """Tokens attend inside their own document alone."""

    verify_data: bool = False
    """Hash every byte of the data at start instead of a fixed sample of blocks.
    Data without a manifest has another fingerprint with it: give it from the start of a run or not at all."""

    allow_duplicate_inputs: bool = False
    """Take datasets that are the same data twice: one under two names, a copy, or two made of one file.
    Each then counts as one of its own."""

    def __post_init__(self) -> None:
        within(self, 0.0, 0.5, "valid_share")
        representable(self)
        if self.valid_share and self.valid_data_path:
            raise UserError(
                f"--valid-share {self.valid_share} and --valid-data-path {' '.join(self.valid_data_path)} both name held-out data; give one"
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """What turned text into ids."""

    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "ByteLevelTokenizer"] | None
    ) = None
    """Kind of tokenizer.
    None: the one named in the dataset's manifest or in the checkpoint; to turn text into ids it has to be given."""

    tokenizer_model: str | None = None
    """SentencePiece model file, or Hugging Face tokenizer.json."""

    vocab_file: str | None = None
    """GPT-2 vocabulary (encoder.json)."""

    merge_file: str | None = None
    """GPT-2 merges (vocab.bpe)."""

    eod_token: str | None = None
    """The token that ends documents, by its text.
    Default: the special token whose name or declaration says so; where several do, this is needed."""
