"""Held-out data that is training data is refused with both names, whatever the names are; other data passes."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt.data.duplicate_inputs import refuse_training_data
from megatron_salt.data.manifest import Manifest, Source, manifest_path, sampled_fingerprint, write_manifest
from megatron_salt.errors import UserError
from tests.support.program import write_tokens

SOURCE = Source(file="books.jsonl", size_bytes=900, lines=30, documents=30, empty_documents=0, rejected_lines=0, text_bytes=800)


def dataset(prefix: Path, seed: int = 0, windows: int = 22) -> str:
    return write_tokens(prefix, seed=seed, windows=windows)


def describe(prefix: str, source: Source, shard: str | None = None) -> str:
    """Give a dataset a manifest."""
    sizes = [os.path.getsize(prefix + suffix) for suffix in (".bin", ".idx")]
    content = Path(prefix + ".bin").read_bytes().hex()[:64]
    manifest = Manifest(
        documents=2,
        tokens=sizes[0] // 2,
        dtype="uint16",
        bin_bytes=sizes[0],
        idx_bytes=sizes[1],
        bin_hash=content,
        idx_hash=content,
        sampled=sampled_fingerprint(prefix),
        tokenizer_type="ByteLevelTokenizer",
        tokenizer_fingerprint="f",
        vocab_size=257,
        eod=256,
        append_eod=True,
        json_key="text",
        sources=(source,),
        shard=shard,
    )
    write_manifest(manifest, manifest_path(prefix))
    return prefix


def copy(prefix: str, to: Path) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, f"{to}{suffix}")
    return str(to)


def link(prefix: str, to: Path) -> str:
    for suffix in (".bin", ".idx"):
        os.link(prefix + suffix, f"{to}{suffix}")
    return str(to)


def test_the_same_file_a_link_to_it_and_a_copy_are_refused_by_name(tmp_path: Path) -> None:
    web, code = dataset(tmp_path / "web"), dataset(tmp_path / "code", seed=1)
    for valid, how in ((web, "is the same file as"), (link(web, tmp_path / "link"), "is the same file as"),
                       (copy(web, tmp_path / "copy"), "holds the same tokens as")):  # fmt: skip
        with pytest.raises(UserError) as refusal:
            refuse_training_data([code, web], [valid])
        assert f"--valid-data-path {valid} {how} --data-path {web}, " in str(refusal.value)
        assert "--allow-valid-in-train" in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_data_passes_also_of_the_same_size(tmp_path: Path) -> None:
    web, code, small = dataset(tmp_path / "web"), dataset(tmp_path / "code", seed=1), dataset(tmp_path / "small", windows=5)
    assert os.path.getsize(web + ".bin") == os.path.getsize(code + ".bin")
    refuse_training_data([web], [code, small])


def test_datasets_made_of_one_text_are_refused_unless_they_are_different_parts_of_it(tmp_path: Path) -> None:
    web, code = dataset(tmp_path / "web"), dataset(tmp_path / "code", seed=1)
    describe(web, SOURCE)
    describe(code, SOURCE)
    with pytest.raises(UserError, match=r"code was made of the same text \(books.jsonl\) as --data-path .*web"):
        refuse_training_data([web], [code])
    describe(code, replace(SOURCE, text_bytes=801))
    refuse_training_data([web], [code])
    describe(web, SOURCE, "1/2")
    describe(code, SOURCE, "2/2")
    refuse_training_data([web], [code])


def test_manifests_tell_apart_what_the_samples_of_blocks_do_not(tmp_path: Path) -> None:
    """Two datasets that differ only between the sampled blocks."""
    web = dataset(tmp_path / "web")
    other = copy(web, tmp_path / "other")
    describe(web, SOURCE)
    describe(other, replace(SOURCE, file="other.jsonl"))
    path = manifest_path(other)
    text = path.read_text()
    content = Path(other + ".bin").read_bytes().hex()[:64]
    path.write_text(text.replace(content, "0" * 64))
    refuse_training_data([web], [other])
