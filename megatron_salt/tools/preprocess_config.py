"""Flags of preprocess_data."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from megatron_salt.config import TokenizerConfig
from megatron_salt.errors import UserError
from megatron_salt.preprocess.inputs import STDIN
from megatron_salt.preprocess.sharding import parse_shard
from megatron_salt.tokenizer.special_tokens import Policy


@dataclass(frozen=True)
class PreprocessConfig:
    """Tokenise text into Megatron's .bin/.idx."""

    input: tuple[str, ...]
    """Files or patterns, or - for standard input: JSON lines, text (.txt), tables (.parquet); .gz, .zst too. Documents keep this order."""

    output_prefix: str
    """Where the dataset goes: PREFIX_KEY_document.bin, .idx, .manifest.json and .tokenizer."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys, or columns of a table, whose strings are documents; each gets a dataset of its own."""

    input_format: Literal["auto", "jsonl", "text", "parquet"] = "auto"
    """How files are read; auto goes by their names, and takes standard input for JSON lines."""

    text_documents: Literal["line", "file"] = "line"
    """What a document is in plain text."""

    append_eod: bool = False
    """End every document with the tokenizer's end-of-document id."""

    prepend_bos: bool = False
    """Begin every document with the tokenizer's beginning-of-sequence id. Off for every --tokenizer-type unless given."""

    special_tokens_in_text: Policy = "split"
    """Special tokens, the end of a document too, that stand in a text. split: text like any other, which gives no special id;
    encode: what the tokenizer's own library makes of them; refuse: an error."""

    workers: int = 1
    """Processes that tokenise."""

    tokenizer_backend: Literal["auto", "reference", "gigatoken"] = "auto"
    """reference: the tokenizer's own library; auto: gigatoken where it is installed and gives the same ids for a sample of the input."""

    max_memory: float | None = None
    """GiB that all processes together may take; documents of many MB come on top (--max-document-mib). Default: about 200 MB a process."""

    max_document_mib: int = 256
    """MiB that a document may have. It is in memory as a whole, several times over; a longer one is refused."""

    resume: bool = False
    """Go on with what a killed run left, from the start where there is nothing. A run with this that fails keeps what it did."""

    shard: str = "0/1"
    """i/n: the i-th, from 0, of n parts of the n or more files, about equal in size; goes to PREFIX-0000i-of-0000n_KEY_document."""

    dedup: Literal["none", "exact"] = "none"
    """exact: of documents with equal texts only the first is kept."""

    shuffle_documents: int | None = None
    """A seed: documents lie in a random order instead of the input's, so that windows join others than neighbours."""

    log_interval: int = 10000
    """Documents between progress lines; on a terminal there is a bar instead."""

    overwrite: bool = False
    """Replace a dataset that is already there, and what a killed run left."""

    max_bad_lines: int = 0
    """Lines that may be left out: malformed JSON, a missing key, a value that is no string, invalid UTF-8."""

    allow_duplicate_inputs: bool = False
    """Take files that are one file under two names, or copies; their documents then come twice."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("workers", self.workers, 1),
            ("log-interval", self.log_interval, 1),
            ("max-bad-lines", self.max_bad_lines, 0),
        ):
            if value < least:
                raise UserError(f"--{name} must be at least {least}, got {value}")
        if not 1 <= self.max_document_mib < 2048:
            raise UserError(f"--max-document-mib must be at least 1 and below 2048, got {self.max_document_mib}")
        if not self.json_keys or len(set(self.json_keys)) < len(self.json_keys):
            raise UserError(f"--json-keys needs one or more different keys, got {' '.join(self.json_keys) or 'none'}")
        if any(os.sep in key for key in self.json_keys):
            raise UserError(f"--json-keys become file names and cannot contain {os.sep}, got {' '.join(self.json_keys)}")
        if self.resume and (self.overwrite or STDIN in self.input):
            raise UserError(
                f"--resume goes with neither --overwrite nor --input {STDIN}: what was read before must still be there"
            )
        if self.shuffle_documents is not None and not 0 <= self.shuffle_documents < 1 << 63:
            raise UserError(f"--shuffle-documents takes a seed from 0 to 2^63 - 1, got {self.shuffle_documents}")
        if parse_shard(self.shard)[1] > 1 and self.is_arranged:
            raise UserError(
                f"--shard {self.shard} goes with neither --dedup nor --shuffle-documents, which are about all documents"
            )

    @property
    def is_arranged(self) -> bool:
        """Whether documents are written a second time."""
        return self.dedup == "exact" or self.shuffle_documents is not None

    @property
    def shard_prefix(self) -> str:
        """--output-prefix, with the shard's number where there are several."""
        i, n = parse_shard(self.shard)
        return self.output_prefix if n == 1 else f"{self.output_prefix}-{i:05d}-of-{n:05d}"
