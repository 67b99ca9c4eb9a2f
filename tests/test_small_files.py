"""Reading small files from anywhere: the content, or one line that says what is wrong; never a wait."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.checkpoint import integrity, owner, safe_unpickle, save_directory
from megatron_salt.checkpoint.integrity import FileSum
from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.cli import exit_status, parse_command
from megatron_salt.config import TokenizerConfig
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.manifest import read_manifest
from megatron_salt.errors import UserError
from megatron_salt.metrics.history import read_curve
from megatron_salt.metrics.sinks import Jsonl
from megatron_salt.preprocess.journal import Journal
from megatron_salt.small_files import parse_json, read_json, read_small, refuse_outside_names
from megatron_salt.tokenizer.tokenizer import DESCRIPTION, build_tokenizer, load_tokenizer

BROKEN = {
    "empty": b"",
    "blank": b" \n",
    "cut": b'{"format": 1',
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep mappings": b'{"a":' * 500 + b"1" + b"}" * 500,
    "key twice": b'{"format": 1, "format": 1}',
    "not UTF-8": b'{"format": "\xff"}',
    "byte order mark": b'\xef\xbb\xbf{"format": 1}',
    "1e999": b'{"format": 1e999}',
    "10**400": b'{"format": 1' + b"0" * 400 + b"}",
    "10**5000": b'{"format": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_no_json_of_ours_is_a_value_error_of_one_short_line(content: bytes) -> None:
    with pytest.raises(ValueError, match="^[^\n]{1,200}$"):
        parse_json(content)


def test_a_number_that_is_not_finite_is_taken_only_where_it_may_be_a_measurement() -> None:
    assert parse_json(b"[Infinity]", nan=True) == [float("inf")]
    with pytest.raises(ValueError, match="NaN"):
        parse_json(b"[NaN]")


@pytest.mark.parametrize("tree", [None, 0, -(2**63), 2**64 - 1, 1e308, "", "[" * 99, [], {"a": [{"b": [1.5, None, True]}]}])
def test_what_json_writes_is_read_as_it_was(tree: Any) -> None:
    assert parse_json(json.dumps(tree).encode()) == tree


def make_directory(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = [make_directory, make_fifo, make_device]


@pytest.mark.parametrize("make", KINDS)
def test_only_a_regular_file_is_read_and_nothing_is_waited_for(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "file")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "file")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_small(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes"):
        read_small(tmp_path / "file", 4)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b", "", "a\0b"])
def test_a_name_outside_its_directory_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="does not lie below"):
        refuse_outside_names(["weights/__0_0.distcp", name])


# ---- the readers that stand on it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside"])
def test_a_list_of_checksums_names_only_files_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    integrity.write_checksums(tmp_path, {name: FileSum(1, "0"), integrity.METADATA: FileSum(1, "0")})
    with pytest.raises(integrity.DamagedCheckpoint, match="does not lie below"):
        integrity.read_checksums(tmp_path)


@pytest.mark.parametrize("size", [-1, 1.5, "1", None, True])
def test_a_list_of_checksums_has_sizes_that_files_can_have(tmp_path: Path, size: Any) -> None:
    integrity.write_checksums(tmp_path, {integrity.METADATA: FileSum(size, "0")})
    with pytest.raises(integrity.DamagedCheckpoint, match=integrity.CHECKSUMS):
        integrity.read_checksums(tmp_path)


@pytest.mark.parametrize("make", KINDS)
def test_a_listed_file_that_is_no_file_is_damage(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "weights")
    assert "not a regular file" in integrity.damaged_files(tmp_path, {"weights": FileSum(0, "0")})[0]


def read_checkpoint_sums(folder: Path) -> Any:
    return integrity.read_checksums(folder)


def read_dataset_manifest(folder: Path) -> Any:
    return read_manifest(str(folder / "data"))


def read_table_of_contents(folder: Path) -> Any:
    return safe_unpickle.read_metadata(folder)


READERS = [
    (read_checkpoint_sums, integrity.CHECKSUMS),
    (read_state, save_directory.STATE),
    (save_directory.read_tracker, save_directory.TRACKER),
    (read_dataset_manifest, "data.manifest.json"),
    (read_table_of_contents, integrity.METADATA),
]


@pytest.mark.parametrize("read, name", READERS)
def test_each_reader_names_its_broken_file_in_one_line(tmp_path: Path, read: Any, name: str) -> None:
    for number, broken in enumerate([*BROKEN.values(), *KINDS, b"null", b"[]", b"-1", b"1.5", b'"text"', b'{"files": 3}']):
        folder = tmp_path / str(number)
        folder.mkdir()
        broken(folder / name) if callable(broken) else (folder / name).write_bytes(broken)
        with pytest.raises(UserError) as caught:
            read(folder)
        assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value) and caught.value.status == 2


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name, opens", [
    (owner.LOCK, lambda path: owner.read(path.parent)),
    ("x.tmp.journal", Journal),
    ("train.jsonl", lambda path: Jsonl(path, 3)),
    ("words.idx", lambda path: TokenFile.open(str(path.with_suffix("")))),
])  # fmt: skip
def test_what_a_run_would_go_on_with_is_a_regular_file(tmp_path: Path, make: Any, name: str, opens: Any) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"^[^\n]*{re.escape(name)}[^\n]* not a regular file[^\n]*$"):
        opens(tmp_path / name)


@pytest.mark.parametrize("body", [*BROKEN.values(), b"null", b"[]"], ids=[*BROKEN, "null", "list"])
def test_a_record_of_a_journal_that_is_no_mapping_is_a_torn_end(tmp_path: Path, body: bytes) -> None:
    def line(body: bytes) -> bytes:
        return hashlib.blake2b(body, digest_size=8).hexdigest().encode() + b" " + body + b"\n"

    (tmp_path / "journal").write_bytes(line(b'{"a": 1}') + line(body))
    assert Journal(tmp_path / "journal").records == [{"a": 1}]
    assert (tmp_path / "journal").read_bytes() == line(b'{"a": 1}')


def made(folder: Path, broken: Any) -> Path:
    folder.mkdir()
    path = folder / "file"
    broken(path) if callable(broken) else path.write_bytes(broken)
    return path


def read_vocabulary(path: Path) -> Any:
    merges = path.with_name("merges.txt")
    merges.write_text("a b")
    return build_tokenizer(TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(path), merge_file=str(merges)))


def read_tokenizer(path: Path) -> Any:
    path.rename(path.with_name(DESCRIPTION))
    return load_tokenizer(path.parent)


def read_config(path: Path) -> Any:
    return parse_command(["--config", str(path)])


def read_log(path: Path) -> Any:
    return read_curve("run", path)


@pytest.mark.parametrize("read", [read_vocabulary, read_tokenizer, read_config, read_log])
def test_each_program_ends_with_status_2_and_one_line_that_names_the_place(
    tmp_path: Path, capsys: pytest.CaptureFixture, read: Any
) -> None:
    for number, broken in enumerate([*BROKEN.values(), *KINDS]):
        if read is read_config and broken in (b"", b" \n"):
            continue  # no settings
        path = made(tmp_path / str(number), broken)
        assert exit_status(lambda path=path: read(path)) == 2, broken
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and str(path.parent) in lines[0]
