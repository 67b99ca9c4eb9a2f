"""Turn text into a training dataset: `<output-prefix>_<key>_document.bin` and `.idx`, in Megatron's format.

Documents keep the order of the input. The files have the same bytes for any number of workers, and after a kill and --resume.
A manifest (`.manifest.json`: counts, tokenizer, content hashes) and a copy of the tokenizer (`.tokenizer/`) lie beside them.

Everything is written under temporary names and renamed at the end. A run that fails leaves nothing. A killed run leaves `.tmp`
files, and --resume continues from them. The first bad line ends the run, unless --max-bad-lines allows some. Blank lines and empty
documents are left out and counted. Memory does not grow with the input.

    python tools/preprocess_data.py --input 'corpus/*.jsonl.zst' --output-prefix data/web --append-eod --workers 8 --resume \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model web.model

On many machines, give each job its own --shard 0/16, 1/16, ... and join the parts with tools/merge_datasets.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

from megatron_salt.cli import run_tool
from megatron_salt.data.manifest import (
    tokenizer_directory,
)
from megatron_salt.data.run_tokenizer import describe_ends, refuse_without_ends
from megatron_salt.errors import UserError
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.preprocess.dedup_shuffle import finish_arranged
from megatron_salt.preprocess.encode import Encoder, EncoderSettings
from megatron_salt.preprocess.indexed_writer import token_dtype
from megatron_salt.preprocess.inputs import STDIN, BadLines, input_files
from megatron_salt.preprocess.journal import Journal
from megatron_salt.preprocess.parse import sample_texts
from megatron_salt.preprocess.readers import Chunk, Form, chunks, form_of
from megatron_salt.preprocess.sharding import files_of_shard, parse_shard
from megatron_salt.preprocess.staging import StagingArea, begin, journal_path, leftovers, publish, remove
from megatron_salt.preprocess.tokenizer_backends import choose_backend
from megatron_salt.preprocess.worker_pool import SizeLimits, encode_chunks, fit_memory
from megatron_salt.tokenizer.special_tokens import SpecialTokenFinder, describe_dataset, describe_sample, refuse_special
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer
from megatron_salt.tools.flags.preprocess_config import PreprocessConfig
from megatron_salt.tools.preprocess_manifest import (
    clean,
    dependencies,
    describe,
    finished_prefix,
    is_complete,
    refuse_existing,
    refuse_missing,
    size_of,
)

CHUNK_BYTES = 1 << 20
ARRANGE_BYTES = 512 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(PreprocessConfig, preprocess, argv)


def preprocess(config: PreprocessConfig) -> None:
    """Check everything that can be checked, encode, write, publish. Raises UserError."""
    files = shard_files(config)
    forms = [file_form(config, file) for file in files]
    tokenizer = build_tokenizer(config.tokenizer, config.special_tokens_in_text == "encode")
    refuse_without_ends(tokenizer, config.append_eod, config.prepend_bos)
    prefixes = [f"{config.shard_prefix}_{key}_document" for key in config.json_keys]
    facts = dependencies(config, files, forms, tokenizer)
    if config.resume and not journal_path(config.shard_prefix).exists() and is_complete(config, prefixes, tokenizer, facts):
        print(f"{', '.join(prefixes)}: already whole")
        return
    limits = fit_memory(SizeLimits(CHUNK_BYTES, config.max_document_mib << 20), config.max_memory, config.workers)
    try:
        with ExitStack() as stack:
            os.makedirs(os.path.dirname(config.output_prefix) or ".", exist_ok=True)
            journal = Journal(journal_path(config.shard_prefix))
            stack.callback(journal.close)
            refuse_existing(config, prefixes, journal)
            begin(journal, facts, config.resume, config.overwrite)
            if not config.resume:
                stack.callback(clean, prefixes, journal)
            if journal.records[1:] and "finished" in journal.records[-1]:
                written = journal.records[-1]["finished"]
            else:
                encoder = make_encoder(config, files, forms, tokenizer, limits)
                written = write_datasets(config, files, forms, tokenizer, encoder, journal, prefixes, limits)
                journal.append({"finished": written})
            for prefix in prefixes:
                publish(finished_prefix(config, prefix), prefix)
            refuse_missing(prefixes, journal)
            clean(prefixes, journal)
    except BrokenPipeError:
        raise UserError("standard output was closed before the end (| head?), so nothing was published") from None
    except OSError as error:
        raise UserError(
            f"--output-prefix {config.output_prefix} cannot be written: {error.strerror} ({error.filename or 'while writing'})"
        ) from error
    for line in written:
        print(line)


def shard_files(config: PreprocessConfig) -> list[str]:
    """Input files of this job: those of its --shard, by default all. Raises UserError."""
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
    own = files_of_shard([os.path.getsize(file) for file in files], shard)
    return [files[number] for number in own]


def file_form(config: PreprocessConfig, file: str) -> Form:
    """How `file` is read. Raises UserError if its form and the flags do not fit."""
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


def make_encoder(
    config: PreprocessConfig, files: list[str], forms: list[Form], tokenizer: Tokenizer, limits: SizeLimits
) -> Encoder:
    """Choose the tokenizer backend. Print it, the ids at document ends, and the special tokens in a sample of the input."""
    sample = []
    if tokenizer.as_json is not None:
        sample = sample_texts(files, forms, config.json_keys, limits.document)
    backend, why = choose_backend(config.tokenizer_backend, tokenizer, sample)
    print(f"tokenizer backend: {why}", flush=True)
    print(describe_ends(tokenizer, config.append_eod, config.prepend_bos), flush=True)
    if sample:
        special = SpecialTokenFinder(tokenizer.special)(sample)
        print(describe_sample(special, len(sample), config.special_tokens_in_text), flush=True)
    settings = EncoderSettings(
        backend=backend,
        keys=config.json_keys,
        append_eod=config.append_eod,
        prepend_bos=config.prepend_bos,
        digests=config.dedup == "exact",
    )
    return Encoder(tokenizer, settings)


def write_datasets(
    config: PreprocessConfig,
    files: list[str],
    forms: list[Form],
    tokenizer: Tokenizer,
    encoder: Encoder,
    journal: Journal,
    prefixes: list[str],
    limits: SizeLimits,
) -> list[str]:
    """Encode the remaining input, finish the files and write their manifests, all under temporary names.

    Returns a line about each dataset.
    """
    if len(journal.records) == 1:
        remove(path for prefix in prefixes for path in leftovers(prefix))
    staging = StagingArea(
        journal, prefixes, files, token_dtype(tokenizer.vocabulary_size), config.dedup == "exact", encoder.settings.backend
    )
    with closing(staging):
        for prefix in prefixes:
            tokenizer.save(tokenizer_directory(finished_prefix(config, prefix)))
        write_documents(config, staging, forms, encoder, limits)
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
    config: PreprocessConfig, staging: StagingArea, forms: list[Form], encoder: Encoder, limits: SizeLimits
) -> None:
    """Encode the documents that the staging area does not have yet, and add them to it."""
    if staging.file or staging.position:
        print(f"resuming in {staging.files[staging.file]}, after {staging.writers[0].documents} documents", flush=True)
    before = [sum(size_of(file) for file in staging.files[:number]) for number in range(len(staging.files))]
    progress = ProgressBar(
        ("documents", "MB", "tokens"),
        total=before[-1] + size_of(staging.files[-1]),
        done=before[staging.file] + staging.on_disk,
        unit="B",
        log_interval=config.log_interval,
    )
    bad_lines = BadLines(config.max_bad_lines, staging.bad_lines)
    with closing(
        encode_chunks(remaining(config, staging, forms, limits), encoder, config.workers, staging.writers[0].dtype)
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
            counts = (each.documents - len(each.bad), sum(each.text_bytes) / 1e6, sum(map(len, each.ids)))
            progress.add(before[chunk.file] + chunk.on_disk, counts)
    staging.note()
    empty = sum(sum(tally.empty) for tally in staging.tallies)
    print(f"read {progress.close()}; {bad_lines.count} bad lines, {empty} empty documents", flush=True)


def remaining(config: PreprocessConfig, staging: StagingArea, forms: list[Form], limits: SizeLimits) -> Iterator[Chunk]:
    """Chunks of the input that the staging area does not have yet."""
    start = staging.position
    for number in range(staging.file, len(staging.files)):
        yield from chunks(number, staging.files[number], forms[number], config.json_keys, start, limits.chunk, limits.document)
        start = 0
