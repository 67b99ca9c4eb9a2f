"""Join datasets into one: the shards of a preprocessing job, or any datasets of one tokenizer.

The merged shards of preprocess_data.py, in order, have the same bytes as the output of a single job. Data is streamed, so memory does
not grow with it. While a part is copied, its counts and hashes are compared with its manifest. A part without a manifest, written by
another tool, must at least be consistent in itself. The result appears whole or not at all. The parts are kept.

    python tools/merge_datasets.py --input 'data/web-*-of-00016_text_document' --output-prefix data/web_text_document
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_salt.cli import run_tool
from megatron_salt.data.duplicate_inputs import WAY_OUT, refuse_repeated_datasets
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.manifest import (
    Manifest,
    manifest_path,
    read_manifest,
    sampled_fingerprint,
    tokenizer_directory,
    write_manifest,
)
from megatron_salt.errors import UserError
from megatron_salt.files import real_path, refuse_present, sole_writer
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.preprocess.indexed_writer import IndexedReader, IndexedWriter, Written
from megatron_salt.preprocess.sharding import parse_shard
from megatron_salt.preprocess.staging import leftovers, output_paths, publish, remove, temporary
from megatron_salt.tokenizer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class MergeConfig:
    """Join datasets into one."""

    input: tuple[str, ...]
    """Prefixes of .bin and .idx files, in order, or patterns of prefixes. The matches of a pattern are sorted."""

    output_prefix: str
    """Prefix of the merged .bin, .idx, .manifest.json and .tokenizer."""

    overwrite: bool = False
    """Replace an existing dataset."""

    allow_duplicate_inputs: bool = False
    """Accept datasets that hold the same data twice. Their documents then come twice."""

    log_interval: int = 10_000_000
    """Documents between lines of progress. A terminal shows a bar instead."""

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise UserError(f"--log-interval must be at least 1, got {self.log_interval}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(MergeConfig, merge_datasets, argv)


def merge_datasets(config: MergeConfig) -> None:
    """Check the parts, copy them, publish the result. Raises UserError."""
    output = config.output_prefix
    if os.path.basename(output) in ("", ".", ".."):
        raise UserError(
            f"--output-prefix {output!r} names no dataset; give the common prefix of the files, such as data/web_text_document"
        )
    prefixes = find_prefixes(config.input)
    if real_path(output) in map(real_path, prefixes):
        raise UserError(f"--output-prefix {output} is one of --input")
    refuse_present("--output-prefix", output, output_paths(output), config.overwrite)
    manifests = [read_manifest(prefix) for prefix in prefixes]
    opened = [TokenFile.open(prefix, "--input") for prefix in prefixes]
    refuse_mixtures(opened, manifests)
    if not config.allow_duplicate_inputs:
        refuse_repeated_datasets("--input", prefixes)
        refuse_repeated_shards(prefixes, manifests)
    refuse_gaps(manifests)
    parts = [IndexedReader(file.prefix, file.dtype, file.num_documents) for file in opened]
    try:
        with ExitStack() as stack:
            stack.enter_context(sole_writer("--output-prefix", output))
            refuse_present("--output-prefix", output, output_paths(output), config.overwrite)
            stack.callback(remove, leftovers(output))
            remove(leftovers(output))
            writer = IndexedWriter(temporary(output), parts[0].dtype)
            stack.callback(writer.discard)
            copy(config, prefixes, manifests, parts, writer)
            written = writer.finish()
            known = [manifest for manifest in manifests if manifest is not None]
            if len(known) == len(manifests):
                load_tokenizer(tokenizer_directory(prefixes[0])).save(tokenizer_directory(temporary(output)))
                write_manifest(
                    merged_manifest(known, written, sampled_fingerprint(writer.prefix)), manifest_path(writer.prefix)
                )
            publish(writer.prefix, output)
    except BrokenPipeError:
        raise UserError("standard output was closed before the end (| head?), so nothing was published") from None
    except OSError as error:
        raise UserError(
            f"--output-prefix {output} cannot be written: {error.strerror} ({error.filename or 'while writing'})"
        ) from error
    print(
        f"wrote {output}: {written.documents} documents, {written.tokens} tokens of {len(parts)} datasets"
        + ("" if None not in manifests else "; without a manifest, because not all of them have one")
    )


def merged_manifest(parts: Sequence[Manifest], written: Written, sampled: str) -> Manifest:
    """Manifest of the merged dataset. parts: manifests of its parts. written: its counts and hashes. sampled: its `sampled:` hash."""
    first = parts[0]
    return replace(
        first,
        documents=written.documents,
        tokens=written.tokens,
        bin_bytes=written.bin_bytes,
        idx_bytes=written.idx_bytes,
        bin_hash=written.bin_hash,
        idx_hash=written.idx_hash,
        sampled=sampled,
        sources=tuple(source for part in parts for source in part.sources),
        duplicates=sum(part.duplicates for part in parts),
        shard=None,
        dedup=first.dedup if len({part.dedup for part in parts}) == 1 else "",
        special_tokens_in_text=first.special_tokens_in_text if all(part.special_tokens_in_text for part in parts) else "",
        special_documents=sum(part.special_documents for part in parts),
        special_tokens=dict(sum((Counter(part.special_tokens) for part in parts), Counter())),
        tokenizer_backends=tuple(sorted({name for part in parts for name in part.tokenizer_backends})),
    )


def find_prefixes(patterns: tuple[str, ...]) -> list[str]:
    """Prefixes of the datasets that --input names. Raises UserError if one is missing."""
    prefixes: list[str] = []
    for pattern in patterns:
        matches = (
            [pattern]
            if os.path.exists(pattern + ".idx")
            else sorted(path.removesuffix(".idx") for path in glob.glob(pattern + ".idx") if not path.endswith(".tmp.idx"))
        )
        if not matches:
            raise UserError(f"--input {pattern}: no such dataset; it takes the common prefix of a .bin and an .idx file")
        prefixes += matches
    return prefixes


def refuse_mixtures(files: list[TokenFile], manifests: list[Manifest | None]) -> None:
    """Raise UserError if the parts differ in token type, or their manifests in tokenizer or flags."""
    described = [(file, manifest) for file, manifest in zip(files, manifests, strict=True) if manifest is not None]
    for file, manifest in zip(files, manifests, strict=True):
        if file.dtype != files[0].dtype:
            raise UserError(
                f"--input {file.prefix} holds {file.dtype}, {files[0].prefix} holds {files[0].dtype}: not of one tokenizer"
            )
        if manifest is None:
            continue
        for name in ("tokenizer_fingerprint", "append_eod", "json_key", "shuffle_seed", "bos", "special_tokens_in_text"):
            known = [(other, value) for other, first in described if (value := getattr(first, name)) != ""]  # "": an older one
            if known and getattr(manifest, name) not in ("", known[0][1]):
                raise UserError(
                    f"--input: {name} of {file.prefix} is {getattr(manifest, name)}, of {known[0][0].prefix} {known[0][1]}"
                )
        if (manifest.documents, manifest.tokens) != (file.num_documents, file.num_tokens):
            raise UserError(
                f"--input {file.prefix} has {file.num_documents} documents and {file.num_tokens} tokens, its manifest says "
                f"{manifest.documents} and {manifest.tokens}"
            )


def refuse_gaps(manifests: list[Manifest | None]) -> None:
    """Raise UserError if a shard is missing or the shards are out of order."""
    shards = [parse_shard(manifest.shard) for manifest in manifests if manifest and manifest.shard]
    for n in {n for _, n in shards}:
        present = [i for i, other in shards if other == n]
        missing = sorted(set(range(n)) - set(present))
        if missing:
            raise UserError(
                f"--input lacks shards {', '.join(f'{i}/{n}' for i in missing[:10])} ({len(missing)} of {n}); "
                "preprocess_data.py --shard makes each"
            )
        if present != sorted(present):
            raise UserError(
                f"--input names shards out of order, {', '.join(f'{i}/{n}' for i in present[:10])}: documents would not lie "
                "in input order"
            )


def refuse_repeated_shards(prefixes: list[str], manifests: list[Manifest | None]) -> None:
    """Raise UserError if two parts have the same shard number."""
    seen: dict[str, str] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest is not None and manifest.shard is not None:
            if manifest.shard in seen:
                raise UserError(
                    f"--input names shard {manifest.shard} twice, as {seen[manifest.shard]} and as {prefix}; {WAY_OUT}"
                )
            seen[manifest.shard] = prefix


def copy(
    config: MergeConfig,
    prefixes: list[str],
    manifests: list[Manifest | None],
    parts: list[IndexedReader],
    writer: IndexedWriter,
) -> None:
    """Append all parts to the writer. Raises UserError if a part does not match its manifest."""
    total = sum(os.path.getsize(prefix + ".bin") for prefix in prefixes)
    progress = ProgressBar(("documents", "MB", "tokens"), total=total, unit="B", log_interval=config.log_interval)
    for prefix, manifest, part in zip(prefixes, manifests, parts, strict=True):
        for ids, lengths in part.batches():
            writer.append(ids, lengths)
            progress.add(writer.tokens * writer.dtype.itemsize, (len(lengths), ids.nbytes / 1e6, len(ids)))
        for suffix, content_hash, recorded in (
            (".bin", part.bin_hash, manifest and manifest.bin_hash),
            (".idx", part.idx_hash, manifest and manifest.idx_hash),
        ):
            if recorded and content_hash != recorded:
                raise UserError(
                    f"--input {prefix}{suffix} has content hash {content_hash}, its manifest {Path(manifest_path(prefix)).name} "
                    f"says {recorded}"
                )
    print(f"copied {progress.close()}", flush=True)
