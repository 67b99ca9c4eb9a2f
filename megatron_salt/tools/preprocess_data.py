"""Turn text into a training dataset: `<output-prefix>_<key>_document.bin` and `.idx`, in Megatron's format.

Documents come out in input order, and the files are the same bytes for any number of workers, and for a run that was killed and
resumed. Beside them lie a manifest (`.manifest.json`: counts, tokenizer, content hashes) and a copy of the tokenizer (`.tokenizer/`).
All is written under temporary names and moved to the final ones at the end; a run that fails leaves nothing, a killed one `.tmp`
files, which --resume goes on with. The first bad line ends the run unless --max-bad-lines says how much text may be lost; blank
lines and empty documents lose none and are left out and counted. Memory does not grow with the input.

    python tools/preprocess_data.py --input 'corpus/*.jsonl.zst' --output-prefix data/web --append-eod --workers 8 --resume \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model web.model

On many machines give each job --shard 0/16, 1/16, ... and then put the parts together with tools/merge_datasets.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_salt.cli import run_tool
from megatron_salt.config import TokenizerConfig
from megatron_salt.data.manifest import (
    Manifest,
    Source,
    fingerprint,
    manifest_path,
    read_manifest,
    sampled_fingerprint,
    sampled_hash,
    tokenizer_directory,
    write_manifest,
)
from megatron_salt.data.run_tokenizer import describe_ends, refuse_without_ends
from megatron_salt.errors import UserError
from megatron_salt.preprocess.dedup_shuffle import finish_arranged
from megatron_salt.preprocess.encode import Encoder, EncoderSettings
from megatron_salt.preprocess.indexed_writer import Written, token_dtype
from megatron_salt.preprocess.inputs import STDIN, BadLines, input_files
from megatron_salt.preprocess.journal import Journal
from megatron_salt.preprocess.parse import sample_texts
from megatron_salt.preprocess.progress_bar import Meter
from megatron_salt.preprocess.readers import Chunk, Form, chunks, form_of
from megatron_salt.preprocess.sharding import files_of_shard, parse_shard
from megatron_salt.preprocess.staging import (
    StagingArea,
    begin,
    journal_path,
    leftovers,
    output_paths,
    publish,
    remove,
    temporary,
)
from megatron_salt.preprocess.tokenizer_backends import choose_backend
from megatron_salt.preprocess.worker_pool import chunk_size, encode_chunks
from megatron_salt.tokenizer.special_tokens import Policy, SpecialTokenFinder, describe_dataset, describe_sample, refuse_special
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer

CHUNK_BYTES = 1 << 20
ARRANGE_BYTES = 512 << 20


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(PreprocessConfig, preprocess, argv)


def preprocess(config: PreprocessConfig) -> None:
    """The whole tool: check everything that can be known, encode, write, publish. UserError for the user's mistakes."""
    files = shard_files(config)
    forms = [file_form(config, file) for file in files]
    tokenizer = build_tokenizer(config.tokenizer, config.special_tokens_in_text == "encode")
    refuse_without_ends(tokenizer, config.append_eod, config.prepend_bos)
    prefixes = [f"{config.shard_prefix}_{key}_document" for key in config.json_keys]
    facts = what_it_depends_on(config, files, forms, tokenizer)
    if config.resume and not journal_path(config.shard_prefix).exists() and are_whole(config, prefixes, tokenizer, facts):
        print(f"{', '.join(prefixes)}: already whole")
        return
    chunk_bytes = chunk_size(config.max_memory, config.workers, CHUNK_BYTES)
    try:
        with ExitStack() as stack:
            os.makedirs(os.path.dirname(config.output_prefix) or ".", exist_ok=True)
            journal = Journal(journal_path(config.shard_prefix))
            stack.callback(journal.close)
            refuse_present(config, prefixes, journal)
            begin(journal, facts, config.resume, config.overwrite)
            if not config.resume:
                stack.callback(clean, prefixes, journal)
            if journal.records[1:] and "finished" in journal.records[-1]:
                written = journal.records[-1]["finished"]
            else:
                longest = config.max_document_mib << 20
                sample = sample_texts(files, forms, config.json_keys, longest) if tokenizer.as_json is not None else []
                backend, why = choose_backend(config.tokenizer_backend, tokenizer, sample)
                print(f"tokenizer backend: {why}", flush=True)
                print(describe_ends(tokenizer, config.append_eod, config.prepend_bos), flush=True)
                if sample:
                    print(
                        describe_sample(
                            SpecialTokenFinder(tokenizer.special)(sample), len(sample), config.special_tokens_in_text
                        ),
                        flush=True,
                    )
                settings = EncoderSettings(
                    backend=backend,
                    keys=config.json_keys,
                    append_eod=config.append_eod,
                    prepend_bos=config.prepend_bos,
                    digests=config.dedup == "exact",
                )
                encoder = Encoder(tokenizer, settings)
                written = write_datasets(config, files, forms, tokenizer, encoder, journal, prefixes, chunk_bytes)
                journal.append({"finished": written})
            for prefix in prefixes:
                publish(finished_prefix(config, prefix), prefix)
            gone = [str(path) for prefix in prefixes for path in output_paths(prefix) if not path.exists()]
            if gone:
                raise UserError(
                    f"{journal.path} says that all was written, but {', '.join(gone)} is not there; put it back, or begin anew "
                    "with --overwrite instead of --resume"
                )
            clean(prefixes, journal)
    except OSError as error:
        raise UserError(
            f"--output-prefix {config.output_prefix} cannot be written: {error.strerror} ({error.filename or 'while writing'})"
        ) from error
    for line in written:
        print(line)


def shard_files(config: PreprocessConfig) -> list[str]:
    """The files of this job, which for most is all of them."""
    files = input_files(config.input, config.allow_duplicate_inputs, config.text_documents == "file")
    shard = parse_shard(config.shard)
    if shard[1] == 1:
        return files
    if STDIN in files:
        raise UserError(f"--shard {config.shard} divides files; --input {STDIN} is none")
    if len(files) < shard[1]:
        raise UserError(
            f"--shard {config.shard}: --input names {len(files)} files, which cannot be divided into {shard[1]} parts, "
            f"for no file is cut: take n up to {len(files)}, or split the files"
        )
    mine = files_of_shard([os.path.getsize(file) for file in files], shard)
    return [files[number] for number in mine]


def file_form(config: PreprocessConfig, file: str) -> Form:
    """How a file is read. UserError where that cannot be."""
    if config.input_format == "auto":
        form = form_of(file, config.text_documents)
    elif config.input_format == "text":
        form = "text" if config.text_documents == "line" else "file"
    else:
        form = "columns" if config.input_format == "parquet" else "jsonl"
    if form in ("text", "file") and len(config.json_keys) > 1:
        raise UserError(f"--input {file} is plain text, which has no keys; --json-keys asks for {' '.join(config.json_keys)}")
    if form == "columns" and file == STDIN:
        raise UserError(f"--input-format parquet reads files, not --input {STDIN}")
    return form


def what_it_depends_on(config: PreprocessConfig, files: list[str], forms: list[Form], tokenizer: Tokenizer) -> dict:
    """All that decides which bytes are written: a run resumes only where it is the same."""
    return {
        "--input": [[file, form, size_of(file), hash_of(file)] for file, form in zip(files, forms, strict=True)],
        "--json-keys": list(config.json_keys),
        "--append-eod": config.append_eod,
        "tokenizer": tokenizer.fingerprint,
        "--prepend-bos": tokenizer.bos if config.prepend_bos else None,
        "--special-tokens-in-text": config.special_tokens_in_text,
        "--dedup": config.dedup,
        "--shuffle-documents": config.shuffle_documents,
    }


def are_whole(config: PreprocessConfig, prefixes: list[str], tokenizer: Tokenizer, facts: dict) -> bool:
    """Whether an earlier run of this job left nothing to do. UserError where what it left is not this, unless that may be replaced, or
    is not what it wrote."""
    if not all(path.exists() for prefix in prefixes for path in output_paths(prefix)):
        return False
    for prefix in prefixes:
        other = made_otherwise(config, prefix, tokenizer, facts)
        if other and not config.overwrite:
            raise UserError(
                f"--resume: {prefix}.bin is whole, and was made with other {', '.join(other)}; "
                "--overwrite replaces it, another --output-prefix leaves it alone"
            )
        if other:
            return False
    try:
        for prefix in prefixes:
            fingerprint(prefix)
    except UserError as error:
        raise UserError(f"{error}; --overwrite instead of --resume makes it anew") from None
    return True


def made_otherwise(config: PreprocessConfig, prefix: str, tokenizer: Tokenizer, facts: dict) -> list[str]:
    """What a dataset was made with and this job would not. Older manifests do not say all of it."""
    there = read_manifest(prefix)
    if there is None:
        return ["flags, which no manifest tells"]
    inputs = {file: (form, size, sampled) for file, form, size, sampled in facts["--input"]}
    known = {source.file: (source.form or inputs.get(source.file, ("",))[0], source.size_bytes,
                           source.sampled or inputs.get(source.file, ("", 0, ""))[2]) for source in there.sources}  # fmt: skip
    return [
        name
        for name, differs in (
            ("--input", list(known.items()) != list(inputs.items())),
            ("tokenizer", there.tokenizer_fingerprint != tokenizer.fingerprint),
            ("--append-eod", there.append_eod != config.append_eod),
            ("--prepend-bos", there.bos != (tokenizer.bos if config.prepend_bos else None)),
            ("--special-tokens-in-text", there.special_tokens_in_text not in ("", config.special_tokens_in_text)),
            ("--dedup", there.dedup not in ("", config.dedup)),
            ("--shuffle-documents", there.shuffle_seed != config.shuffle_documents),
        )
        if differs
    ]


def refuse_present(config: PreprocessConfig, prefixes: list[str], journal: Journal) -> None:
    """UserError where the output exists, unless it may be replaced."""
    present = [str(path) for prefix in prefixes for path in output_paths(prefix) if path.exists()]
    resumed = config.resume and len(journal.records) > 1  # the run that began it was allowed to
    if present and not config.overwrite and not resumed:
        if not journal.records:
            remove([journal.path])
        raise UserError(f"--output-prefix {config.output_prefix}: {', '.join(present)} exists; --overwrite replaces it")


def write_datasets(
    config: PreprocessConfig,
    files: list[str],
    forms: list[Form],
    tokenizer: Tokenizer,
    encoder: Encoder,
    journal: Journal,
    prefixes: list[str],
    chunk_bytes: int,
) -> list[str]:
    """Encode what is left, finish the files and write their manifests, all under temporary names; a line on each dataset."""
    if len(journal.records) == 1:
        remove(path for prefix in prefixes for path in leftovers(prefix))
    staging = StagingArea(
        journal, prefixes, files, token_dtype(tokenizer.vocabulary_size), config.dedup == "exact", encoder.settings.backend
    )
    with closing(staging):
        for prefix in prefixes:
            tokenizer.save(tokenizer_directory(finished_prefix(config, prefix)))
        write_documents(config, staging, forms, encoder, chunk_bytes)
        lines = []
        for i, key in enumerate(config.json_keys):
            if staging.writers[i].documents == 0:
                raise UserError(f"--input {' '.join(config.input)}: no document under the key {key!r}; nothing was written")
            source = staging.writers[i]
            if config.is_arranged:
                budget = int(config.max_memory * 2**30 / 2) if config.max_memory else ARRANGE_BYTES
                written = finish_arranged(
                    source, finished_prefix(config, prefixes[i]), config.dedup == "exact", config.shuffle_documents, budget
                )
            else:
                written = source.write_index()
            duplicates = source.documents - written.documents
            manifest = describe(config, i, written, duplicates, tokenizer, staging, journal.records[0]["--input"])
            text_bytes = sum(tally.text_bytes[i] for tally in staging.tallies)
            lines.append(
                f"wrote {prefixes[i]}.bin .idx .manifest.json .tokenizer: {manifest.documents} documents, "
                f"{manifest.tokens} tokens, {text_bytes / source.tokens:.2f} bytes a token"
                + (f"; {duplicates} duplicates left out" if config.dedup == "exact" else "")
                + describe_dataset(manifest.special_documents, manifest.special_tokens, config.special_tokens_in_text)
            )
    return lines


def write_documents(
    config: PreprocessConfig, staging: StagingArea, forms: list[Form], encoder: Encoder, chunk_bytes: int
) -> None:
    """Encode all documents from where the staging area ends into its writers."""
    if staging.file or staging.position:
        print(f"resuming in {staging.files[staging.file]}, after {staging.writers[0].documents} documents", flush=True)
    before = [sum(size_of(file) for file in staging.files[:number]) for number in range(len(staging.files))]
    meter = Meter(before[-1] + size_of(staging.files[-1]), before[staging.file] + staging.on_disk, config.log_interval)
    bad_lines = BadLines(config.max_bad_lines, staging.bad_lines)
    with closing(
        encode_chunks(remaining(config, staging, forms, chunk_bytes), encoder, config.workers, staging.writers[0].dtype)
    ) as encoded:
        for each in encoded:
            chunk = each.chunk
            if config.special_tokens_in_text == "refuse":
                for i, key in enumerate(config.json_keys):
                    tally = staging.tallies[chunk.file]
                    refuse_special(each.special[i], tally.written[i] + tally.empty[i], chunk.path, key)
            first = staging.tallies[chunk.file].lines + 1
            staging.add(each)
            bad_lines.add(chunk.path, [(first + line, reason) for line, _, reason in each.bad])
            meter.add(
                each.documents - len(each.bad),
                sum(each.text_bytes),
                sum(map(len, each.ids)),
                before[chunk.file] + chunk.on_disk,
            )
    staging.note()
    empty = sum(sum(tally.empty) for tally in staging.tallies)
    print(f"read {meter.close()}; {bad_lines.count} bad lines, {empty} empty documents", flush=True)


def remaining(config: PreprocessConfig, staging: StagingArea, forms: list[Form], chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks that are not in the staging area yet."""
    start = staging.position
    for number in range(staging.file, len(staging.files)):
        yield from chunks(
            number, staging.files[number], forms[number], config.json_keys, start, chunk_bytes, config.max_document_mib << 20
        )
        start = 0


def finished_prefix(config: PreprocessConfig, prefix: str) -> str:
    """Where a dataset is finished before it gets its name."""
    return temporary(prefix) + ".order" if config.is_arranged else temporary(prefix)


def describe(
    config: PreprocessConfig,
    i: int,
    written: Written,
    duplicates: int,
    tokenizer: Tokenizer,
    staging: StagingArea,
    inputs: list,
) -> Manifest:
    """Write the manifest of key number `i`. inputs: what the run depends on of them."""
    prefix = finished_prefix(config, staging.prefixes[i])
    sources = tuple(
        Source(
            file=file,
            size_bytes=size_of(file),
            lines=tally.documents,
            documents=tally.written[i],
            empty_documents=tally.empty[i],
            rejected_lines=sum(tally.rejected.values()),
            text_bytes=tally.text_bytes[i],
            reasons=tally.rejected,
            form=form,
            sampled=sampled,
        )
        for file, tally, (_, form, _, sampled) in zip(staging.files, staging.tallies, inputs, strict=True)
    )
    manifest = Manifest(
        documents=written.documents,
        tokens=written.tokens,
        dtype=staging.writers[i].dtype.name,
        bin_bytes=written.bin_bytes,
        idx_bytes=written.idx_bytes,
        bin_hash=written.bin_hash,
        idx_hash=written.idx_hash,
        sampled=sampled_fingerprint(prefix),
        tokenizer_type=tokenizer.kind,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocabulary_size,
        eod=tokenizer.eod,
        append_eod=config.append_eod,
        json_key=config.json_keys[i],
        sources=sources,
        shard=config.shard if parse_shard(config.shard)[1] > 1 else None,
        duplicates=duplicates,
        shuffle_seed=config.shuffle_documents,
        tokenizer_backends=tuple(sorted(staging.backends)),
        bos=tokenizer.bos if config.prepend_bos else None,
        special_tokens_in_text=config.special_tokens_in_text,
        special_documents=sum(tally.special_documents[i] for tally in staging.tallies),
        special_tokens=dict(sum((Counter(tally.special_tokens[i]) for tally in staging.tallies), Counter())),
        dedup=config.dedup,
    )
    write_manifest(manifest, manifest_path(prefix))
    return manifest


def size_of(file: str) -> int:
    """Bytes on disk; 0 of a pipe."""
    return os.path.getsize(file) if os.path.isfile(file) else 0


def hash_of(file: str) -> str:
    """Of its size and a fixed sample of its blocks; empty of a pipe."""
    return sampled_hash(Path(file)) if os.path.isfile(file) else ""


def clean(prefixes: list[str], journal: Journal) -> None:
    """Delete everything that has a temporary name."""
    remove(path for prefix in prefixes for path in leftovers(prefix))
    remove([journal.path])
