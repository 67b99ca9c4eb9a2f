"""Turn JSON lines into a training dataset: `<output-prefix>_<key>_document.bin` and `.idx`, in Megatron's format.

Documents come out in input order, and the files are the same bytes for any number of workers. Beside them lie a manifest
(`.manifest.json`: counts, tokenizer, content hashes) and a copy of the tokenizer (`.tokenizer/`). All is written under
temporary names and moved to the final ones at the end; a run that fails leaves nothing, a killed one `.tmp` files at most.
The first bad line ends the run unless --max-bad-lines says how much text may be lost; blank lines and empty documents
lose none and are left out and counted.

    python tools/preprocess_data.py --input 'corpus/*.jsonl' --output-prefix data/web --append-eod --workers 8 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model web.model
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from megatron_salt.cli import run_tool
from megatron_salt.config import TokenizerConfig
from megatron_salt.data.documents import BadLines, input_files, line_batches
from megatron_salt.data.encode import Encoder, encode_batches
from megatron_salt.data.indexed import IndexedWriter, token_dtype
from megatron_salt.data.manifest import (
    Manifest,
    Source,
    manifest_path,
    sampled_fingerprint,
    tokenizer_directory,
    write_manifest,
)
from megatron_salt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_salt.errors import UserError

BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class PreprocessConfig:
    """Tokenise JSON lines into Megatron's .bin/.idx."""

    input: tuple[str, ...]
    """Files or glob patterns, one JSON object a line; .gz is decompressed. Documents keep this order."""

    output_prefix: str
    """Where the dataset goes: PREFIX_KEY_document.bin, .idx, .manifest.json and .tokenizer."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys whose strings are documents; each key gets a dataset of its own."""

    append_eod: bool = False
    """End every document with the tokenizer's end-of-document id."""

    workers: int = 1
    """Processes that tokenise."""

    log_interval: int = 10000
    """Documents between progress lines."""

    overwrite: bool = False
    """Replace a dataset that is already there."""

    max_bad_lines: int = 0
    """Lines that may be left out: malformed JSON, a missing key, a value that is no string, invalid UTF-8."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        for name, value, least in (("workers", self.workers, 1), ("log-interval", self.log_interval, 1),
                                   ("max-bad-lines", self.max_bad_lines, 0)):
            if value < least:
                raise UserError(f"--{name} must be at least {least}, got {value}")
        if not self.json_keys or len(set(self.json_keys)) < len(self.json_keys):
            raise UserError(f"--json-keys needs one or more different keys, got {' '.join(self.json_keys) or 'none'}")
        if any(os.sep in key for key in self.json_keys):
            raise UserError(f"--json-keys become file names and cannot contain {os.sep}, got {' '.join(self.json_keys)}")


@dataclass
class Tally:
    """Counts of one input file; per key where there is a list."""

    lines: int
    rejected: int
    documents: list[int]
    empty: list[int]


def preprocess(config: PreprocessConfig) -> None:
    """The whole tool: check everything that can be known, encode, write, publish. UserError for the user's mistakes."""
    files = input_files(config.input)
    tokenizer = build_tokenizer(config.tokenizer)
    if config.append_eod and tokenizer.eod is None:
        raise UserError(f"--append-eod: the {tokenizer.kind} has no end-of-document token")
    prefixes = [f"{config.output_prefix}_{key}_document" for key in config.json_keys]
    present = [str(path) for prefix in prefixes for path in output_paths(prefix) if path.exists()]
    if present and not config.overwrite:
        raise UserError(f"--output-prefix {config.output_prefix}: {', '.join(present)} exists; --overwrite replaces it")

    encoder = Encoder(tokenizer, config.json_keys, config.append_eod)
    try:
        with ExitStack() as stack:
            os.makedirs(os.path.dirname(config.output_prefix) or ".", exist_ok=True)
            writers = [open_writer(prefix, tokenizer, stack) for prefix in prefixes]
            tallies = write_documents(config, files, encoder, writers)
            for key, writer in zip(config.json_keys, writers, strict=True):
                if writer.documents == 0:
                    raise UserError(f"--input {' '.join(config.input)}: no document under the key {key!r}; nothing was written")
            for i, writer in enumerate(writers):
                describe(config, i, writer, tokenizer, tallies)
            for prefix, writer in zip(prefixes, writers, strict=True):
                publish(writer.prefix, prefix)
    except OSError as error:
        raise UserError(f"--output-prefix {config.output_prefix} cannot be written: {error.strerror} "
                        f"({error.filename or 'while writing'})") from error
    for prefix, writer in zip(prefixes, writers, strict=True):
        print(f"wrote {prefix}.bin .idx .manifest.json .tokenizer: {writer.documents} documents, {writer.tokens} tokens")


def write_documents(config: PreprocessConfig, files: list[str], encoder: Encoder,
                    writers: list[IndexedWriter]) -> dict[str, Tally]:
    """Encode all lines of `files` into the writers (one a key); counts per file, in the files' order."""
    none = [0] * len(writers)
    tallies = {file: Tally(0, 0, list(none), list(none)) for file in files}
    bad_lines = BadLines(config.max_bad_lines)
    batches = itertools.chain.from_iterable(line_batches(file, BATCH_BYTES) for file in files)
    started, documents, text_bytes = time.monotonic(), 0, 0
    with closing(encode_batches(batches, encoder, config.workers)) as encoded:
        for batch in encoded:
            bad_lines.add(batch.file, batch.bad)
            tally = tallies[batch.file]
            tally.lines += batch.lines
            tally.rejected += len(batch.bad)
            for i, writer in enumerate(writers):
                writer.append(batch.ids[i], batch.lengths[i])
                tally.documents[i] += len(batch.lengths[i])
                tally.empty[i] += batch.empty[i]
            before, documents = documents, documents + batch.lines - len(batch.bad)
            text_bytes += batch.text_bytes
            if documents // config.log_interval > before // config.log_interval:
                speed = text_bytes / 1e6 / max(time.monotonic() - started, 1e-6)
                print(f"{documents} documents, {text_bytes / 1e6:.1f} MB, {speed:.2f} MB/s, "
                      f"{sum(writer.tokens for writer in writers)} tokens", flush=True)
    seconds = max(time.monotonic() - started, 1e-6)
    print(f"read {documents} documents, {text_bytes / 1e6:.1f} MB in {seconds:.1f} s, {text_bytes / 1e6 / seconds:.2f} MB/s; "
          f"{bad_lines.count} bad lines, {sum(sum(tally.empty) for tally in tallies.values())} empty documents", flush=True)
    return tallies


def output_paths(prefix: str) -> list[Path]:
    """All that belongs to a dataset, in the order in which it is published."""
    return [Path(prefix + ".bin"), tokenizer_directory(prefix), Path(prefix + ".idx"), manifest_path(prefix)]


def open_writer(prefix: str, tokenizer: Tokenizer, stack: ExitStack) -> IndexedWriter:
    """A writer under a temporary name, and the tokenizer beside it. Leaving `stack` deletes what is left of both."""
    temporary = prefix + ".tmp"
    stack.callback(_remove, output_paths(temporary))
    _remove(output_paths(temporary))  # of a run that was killed
    writer = IndexedWriter(temporary, token_dtype(tokenizer.vocab_size))
    stack.callback(writer.discard)
    tokenizer.save(tokenizer_directory(temporary))
    return writer


def describe(config: PreprocessConfig, i: int, writer: IndexedWriter, tokenizer: Tokenizer, tallies: dict[str, Tally]) -> None:
    """Finish the files of key number `i` and write their manifest."""
    written = writer.finish()
    sources = tuple(Source(file, os.path.getsize(file), tally.lines, tally.documents[i], tally.empty[i], tally.rejected)
                    for file, tally in tallies.items())
    write_manifest(Manifest(
        written.documents, written.tokens, writer.dtype.name, written.bin_bytes, written.idx_bytes, written.bin_hash,
        written.idx_hash, sampled_fingerprint(writer.prefix), tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size,
        tokenizer.eod, config.append_eod, config.json_keys[i], sources), manifest_path(writer.prefix))


def publish(temporary: str, prefix: str) -> None:
    """Move a finished dataset to its name. What it replaces loses manifest and index first and gets them last, so a crash in
    between leaves no index, or an index without a manifest, but never a mixture that looks whole."""
    _remove(reversed(output_paths(prefix)))
    for source, target in zip(output_paths(temporary), output_paths(prefix), strict=True):
        os.replace(source, target)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(run_tool(PreprocessConfig, preprocess))
