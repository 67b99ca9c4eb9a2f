"""Flags of tools/preprocess_data.py. Docstrings of fields are their help texts."""

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
    """Input files or patterns, in this order: JSON lines, text (.txt) or tables (.parquet), also as .gz or .zst; - for standard input."""

    output_prefix: str
    """Prefix of the output: PREFIX_KEY_document.bin, .idx, .manifest.json and .tokenizer."""

    json_keys: tuple[str, ...] = ("text",)
    """JSON keys or table columns whose strings are documents. Each becomes a dataset of its own."""

    input_format: Literal["auto", "jsonl", "text", "parquet"] = "auto"
    """How files are read. auto: by their names; standard input is read as JSON lines."""

    text_documents: Literal["line", "file"] = "line"
    """In plain text, whether a document is a line or a whole file."""

    append_eod: bool = False
    """End every document with the tokenizer's end-of-document id."""

    prepend_bos: bool = False
    """Begin every document with the tokenizer's beginning-of-sequence id. Off by default for every --tokenizer-type."""

    special_tokens_in_text: Policy = "split"
    """What happens to special tokens (the end of a document too) that a text spells out. split: encoded as ordinary text, without
    special ids; encode: as the tokenizer's own library encodes them; refuse: an error."""

    workers: int = 1
    """Number of processes that tokenise."""

    tokenizer_backend: Literal["auto", "reference", "gigatoken"] = "auto"
    """reference: the tokenizer's own library. auto: gigatoken, if it is installed and gives the same ids for a sample of the input."""

    max_memory: float | None = None
    """GiB of memory for all processes together. It also lowers --max-document-mib where needed. Default: about 200 MB a process."""

    max_document_mib: int = 256
    """Largest document in MiB; a longer one is refused. A document is held in memory as a whole, several times over."""

    resume: bool = False
    """Continue a killed run; start from the beginning if there is none. With this flag a run that fails keeps its work."""

    shard: str = "0/1"
    """i/n: read part i (from 0) of the input files, cut into n parts of similar size. Output: PREFIX-0000i-of-0000n_KEY_document."""

    dedup: Literal["none", "exact"] = "none"
    """exact: keep only the first of documents with equal texts."""

    shuffle_documents: int | None = None
    """Seed: write the documents in a random order, so that a window does not join neighbours of the input."""

    log_interval: int = 10000
    """Documents between lines of progress. A terminal shows a bar instead."""

    overwrite: bool = False
    """Replace an existing dataset, and the files of a killed run."""

    max_bad_lines: int = 0
    """Number of bad lines that may be left out: malformed JSON, a missing key, a value that is not a string, invalid UTF-8."""

    allow_duplicate_inputs: bool = False
    """Accept the same file under two names, and copies of a file. Their documents then come twice."""

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
        """Whether documents are written a second time: without duplicates, or in random order."""
        return self.dedup == "exact" or self.shuffle_documents is not None

    @property
    def shard_prefix(self) -> str:
        """--output-prefix, with the number of the shard if there are several."""
        i, n = parse_shard(self.shard)
        return self.output_prefix if n == 1 else f"{self.output_prefix}-{i:05d}-of-{n:05d}"
