"""A fingerprint names contents: equal for equal files, different for other files, checked against the manifest."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.manifest import (
    Manifest,
    Source,
    fingerprint,
    manifest_path,
    read_manifest,
    sampled_fingerprint,
    write_manifest,
)
from megatron_salt.errors import UserError
from megatron_salt.preprocess.indexed_writer import IndexedWriter

SOURCE = Source(file="a.jsonl", size_bytes=1, lines=2, documents=3, empty_documents=0, rejected_lines=0)


def write_dataset(prefix: Path, num_tokens: int = 1000, with_manifest: bool = True) -> str:
    """A dataset of documents of 10 tokens."""
    writer = IndexedWriter(str(prefix), np.dtype(np.uint16))
    writer.append((np.arange(num_tokens) * 7 % 5003).astype(np.uint16), np.full(num_tokens // 10, 10, np.int32))
    written = writer.finish()
    if with_manifest:
        write_manifest(
            Manifest(
                documents=written.documents,
                tokens=written.tokens,
                dtype="uint16",
                bin_bytes=written.bin_bytes,
                idx_bytes=written.idx_bytes,
                bin_hash=written.bin_hash,
                idx_hash=written.idx_hash,
                sampled=sampled_fingerprint(str(prefix)),
                tokenizer_type="ByteLevelTokenizer",
                tokenizer_fingerprint="f",
                vocab_size=257,
                eod=None,
                append_eod=False,
                json_key="text",
                sources=(SOURCE,),
            ),
            manifest_path(str(prefix)),
        )
    return str(prefix)


def flip(path: str, offset: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 1]))


def change(prefix: str, **values: object) -> None:
    """Overwrite fields of the manifest's JSON."""
    path = manifest_path(prefix)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_manifest_reads_back_as_written(tmp_path):
    prefix = write_dataset(tmp_path / "a")
    manifest = read_manifest(prefix)
    write_manifest(manifest, manifest_path(prefix))
    assert read_manifest(prefix) == manifest and manifest.sources == (SOURCE,)


def test_reading_every_byte_gives_the_fingerprint_that_was_taken_while_writing(tmp_path):
    prefix = write_dataset(tmp_path / "a")
    promised = fingerprint(prefix)
    manifest_path(prefix).unlink()
    assert promised.startswith("content:") and fingerprint(prefix, verify=True) == promised


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("with_manifest", [False, True])
def test_equal_files_have_equal_fingerprints_whatever_they_are_called(tmp_path, verify, with_manifest):
    first, second = (write_dataset(tmp_path / name, with_manifest=with_manifest) for name in ("a", "b"))
    other = write_dataset(tmp_path / "c", 1010, with_manifest=with_manifest)
    assert fingerprint(first, verify) == fingerprint(second, verify) != fingerprint(other, verify)


def test_foreign_files_have_a_sampled_fingerprint(tmp_path):
    assert fingerprint(write_dataset(tmp_path / "a", with_manifest=False)).startswith("sampled:")


@pytest.mark.parametrize("suffix, offset", [(".bin", 0), (".bin", 1999), (".bin", 777), (".idx", 20), (".idx", 900)])
def test_any_changed_byte_of_small_files_changes_the_sampled_fingerprint(tmp_path, suffix, offset):
    prefix = write_dataset(tmp_path / "a", with_manifest=False)
    before = fingerprint(prefix)
    flip(prefix + suffix, offset)
    assert fingerprint(prefix) != before


def test_the_sample_spans_the_whole_file(tmp_path):
    prefix = write_dataset(tmp_path / "a", 1_000_000, with_manifest=False)
    before, seen = fingerprint(prefix), []
    for i in range(0, 2_000_000, 2_000_000 // 400):
        flip(prefix + ".bin", i)
        seen.append(fingerprint(prefix) != before)
        flip(prefix + ".bin", i)
    tenths = [any(seen[i : i + 40]) for i in range(0, 400, 40)]
    assert all(tenths) and not all(seen)


def test_a_change_between_the_sampled_blocks_is_found_by_verify_alone_and_named(tmp_path):
    prefix = write_dataset(tmp_path / "a", 1_000_000)
    recorded = fingerprint(prefix)
    flip(prefix + ".bin", 6000)
    assert fingerprint(prefix) == recorded
    with pytest.raises(UserError) as error:
        fingerprint(prefix, verify=True)
    message = str(error.value)
    assert "--verify-data" in message and f"{prefix}.bin" in message and read_manifest(prefix).bin_hash in message
    manifest_path(prefix).unlink()
    assert fingerprint(prefix, verify=True) != recorded


@pytest.mark.parametrize("verify", [False, True])
def test_files_that_are_not_the_manifests_are_refused(tmp_path, verify):
    prefix = write_dataset(tmp_path / "a")
    flip(prefix + ".bin", 100)
    with pytest.raises(UserError, match=r"a\.bin"):
        fingerprint(prefix, verify)


def test_truncation_is_refused_with_both_sizes(tmp_path):
    prefix = write_dataset(tmp_path / "a")
    os.truncate(prefix + ".bin", 1998)
    with pytest.raises(UserError, match="1998 bytes.*2000"):
        fingerprint(prefix)


def test_missing_files_are_named_with_their_flag(tmp_path):
    with pytest.raises(UserError, match=r"--data-path"):
        fingerprint(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "values, word",
    [
        ({"format": 99}, "format 99"),
        ({"format": "x\ny"}, r"format 'x\\ny'"),
        ({"extra": 1}, "extra"),
        ({"tokens": 999}, "contradicts"),
        ({"sources": [{"file": "a"}]}, "sources"),
    ],
)
def test_a_damaged_manifest_is_refused_not_ignored(tmp_path, values, word):
    prefix = write_dataset(tmp_path / "a")
    change(prefix, **values)
    with pytest.raises(UserError, match=word):
        fingerprint(prefix)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_manifest_that_is_not_json_is_refused(tmp_path, content):
    prefix = write_dataset(tmp_path / "a")
    manifest_path(prefix).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        fingerprint(prefix)


def test_the_cost_of_a_sampled_fingerprint_does_not_grow_with_the_data(tmp_path):
    prefix = str(tmp_path / "a")
    for suffix, size in ((".bin", 2 << 40), (".idx", 20 << 30)):  # sparse files
        with open(prefix + suffix, "wb") as stream:
            stream.truncate(size)
    started = time.monotonic()
    fingerprint(prefix)
    assert time.monotonic() - started < 1.0


def test_every_field_is_checked_when_read(tmp_path):
    prefix = write_dataset(tmp_path / "a")
    for field in dataclasses.fields(Manifest):
        whole = manifest_path(prefix).read_text()
        change(prefix, **{field.name: 1.5})
        with pytest.raises(UserError, match=field.name):
            read_manifest(prefix)
        manifest_path(prefix).write_text(whole)
