"""Preprocessed datasets: what decides their bytes, whether an earlier run wrote the same one, and their manifest."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from megatron_salt.data.manifest import (
    Manifest,
    Source,
    fingerprint,
    manifest_path,
    read_manifest,
    sampled_fingerprint,
    sampled_hash,
    write_manifest,
)
from megatron_salt.errors import UserError
from megatron_salt.preprocess.indexed_writer import Written
from megatron_salt.preprocess.journal import Journal
from megatron_salt.preprocess.readers import Form
from megatron_salt.preprocess.sharding import parse_shard
from megatron_salt.preprocess.staging import StagingArea, leftovers, output_paths, remove, temporary
from megatron_salt.tokenizer.tokenizer import Tokenizer
from megatron_salt.tools.flags.preprocess_config import PreprocessConfig


def dependencies(config: PreprocessConfig, files: list[str], forms: list[Form], tokenizer: Tokenizer) -> dict:
    """Everything that decides which bytes are written, ready for JSON. A run resumes only if this is the same."""
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


def is_complete(config: PreprocessConfig, prefixes: list[str], tokenizer: Tokenizer, facts: dict) -> bool:
    """Whether an earlier run of this job wrote all datasets. facts: their `dependencies`.

    Raises UserError if a complete dataset was made with other flags or input and --overwrite is not given, or if it is damaged.
    """
    if not all(path.exists() for prefix in prefixes for path in output_paths(prefix)):
        return False
    for prefix in prefixes:
        other = differing_flags(config, prefix, tokenizer, facts)
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


def differing_flags(config: PreprocessConfig, prefix: str, tokenizer: Tokenizer, facts: dict) -> list[str]:
    """Flags whose values differ between an existing dataset and this job. Fields that an older manifest lacks do not count."""
    existing = read_manifest(prefix)
    if existing is None:
        return ["flags, which no manifest tells"]
    inputs = {file: (form, size, sampled) for file, form, size, sampled in facts["--input"]}
    known = {}
    for source in existing.sources:
        form, _, sampled = inputs.get(source.file, ("", 0, ""))
        known[source.file] = (source.form or form, source.size_bytes, source.sampled or sampled)
    return [
        name
        for name, differs in (
            ("--input", list(known.items()) != list(inputs.items())),
            ("tokenizer", existing.tokenizer_fingerprint != tokenizer.fingerprint),
            ("--append-eod", existing.append_eod != config.append_eod),
            ("--prepend-bos", existing.bos != (tokenizer.bos if config.prepend_bos else None)),
            ("--special-tokens-in-text", existing.special_tokens_in_text not in ("", config.special_tokens_in_text)),
            ("--dedup", existing.dedup not in ("", config.dedup)),
            ("--shuffle-documents", existing.shuffle_seed != config.shuffle_documents),
        )
        if differs
    ]


def refuse_existing(config: PreprocessConfig, prefixes: list[str], journal: Journal) -> None:
    """Raise UserError if an output exists and may not be replaced."""
    present = [str(path) for prefix in prefixes for path in output_paths(prefix) if path.exists()]
    resumed = config.resume and len(journal.records) > 1  # the run that is resumed was allowed to replace it
    if present and not config.overwrite and not resumed:
        if not journal.records:
            remove([journal.path])
        raise UserError(f"--output-prefix {config.output_prefix}: {', '.join(present)} exists; --overwrite replaces it")


def refuse_missing(prefixes: list[str], journal: Journal) -> None:
    """Raise UserError if a published file is missing, though the journal says that all were written."""
    missing = [str(path) for prefix in prefixes for path in output_paths(prefix) if not path.exists()]
    if missing:
        raise UserError(
            f"{journal.path} says that all was written, but {', '.join(missing)} is not there; put it back, or begin anew "
            "with --overwrite instead of --resume"
        )


def finished_prefix(config: PreprocessConfig, prefix: str) -> str:
    """Temporary prefix of a finished dataset, before it is published."""
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
    """Write the manifest of the dataset of key number `i`, and return it.

    written: what its files hold. duplicates: documents that --dedup left out. inputs: "--input" of `dependencies`.
    """
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
    """Bytes of `file` on disk; 0 for a pipe."""
    return os.path.getsize(file) if os.path.isfile(file) else 0


def hash_of(file: str) -> str:
    """Hash of the size and of a fixed sample of blocks of `file`; empty for a pipe."""
    return sampled_hash(Path(file)) if os.path.isfile(file) else ""


def clean(prefixes: list[str], journal: Journal) -> None:
    """Delete all temporary files, the journal too."""
    remove(path for prefix in prefixes for path in leftovers(prefix))
    remove([journal.path])
