from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_salt.checkpoint import integrity, safe_unpickle
from megatron_salt.checkpoint.integrity import CHECKSUMS, METADATA, DamagedCheckpoint
from megatron_salt.checkpoint.safe_unpickle import COMMON, Unreadable, UnsafePickle
from tests.support.checkpoint_runs import flip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two files and the list of their sums."""
    (tmp_path / "shards").mkdir()
    (tmp_path / METADATA).write_bytes(b"table of contents")
    (tmp_path / "shards" / "a").write_bytes(bytes(range(256)))
    names = (METADATA, "shards/a")
    integrity.write_checksums(tmp_path, {name: integrity.sum_of_file(tmp_path / name) for name in names})
    return tmp_path


def test_files_as_written_are_not_reported(directory: Path) -> None:
    assert integrity.damaged_files(directory, integrity.read_checksums(directory)) == []


@pytest.mark.parametrize("offset", [0, 100, 255])
def test_a_flipped_byte_is_reported_with_both_sums(directory: Path, offset: int) -> None:
    expected = integrity.sum_of_file(directory / "shards" / "a")
    flip(directory / "shards" / "a", offset)
    (line,) = integrity.damaged_files(directory, integrity.read_checksums(directory))
    found = integrity.sum_of_file(directory / "shards" / "a")
    assert str(directory / "shards" / "a") in line and str(found) in line and str(expected) in line


def test_a_truncated_and_a_missing_file_are_reported(directory: Path) -> None:
    os.truncate(directory / "shards" / "a", 255)
    (directory / METADATA).unlink()
    lines = integrity.damaged_files(directory, integrity.read_checksums(directory))
    assert len(lines) == 2
    assert any("255 bytes" in line and "256 bytes" in line for line in lines)
    assert any("No such file" in line and METADATA in line for line in lines)


def test_the_list_of_sums_is_refused_after_a_change_of_any_byte(directory: Path) -> None:
    whole = (directory / CHECKSUMS).read_bytes()
    for offset in range(len(whole)):
        flip(directory / CHECKSUMS, offset)
        with pytest.raises(DamagedCheckpoint, match=CHECKSUMS):
            integrity.read_checksums(directory)
        (directory / CHECKSUMS).write_bytes(whole)
    for length in range(len(whole)):
        (directory / CHECKSUMS).write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match=CHECKSUMS):
            integrity.read_checksums(directory)


def test_a_list_that_lacks_a_required_file_is_refused(directory: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="state.json"):
        integrity.read_checksums(directory, required=(METADATA, "state.json"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    integrity.write_summed(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        integrity.write_summed(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


class _Command:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def _metadata(relative_path: str = "__0_0.distcp", length: int = 0) -> Metadata:
    size = torch.Size([2, 3])
    tensors = {
        "weight": TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, []),
        "object": BytesStorageMetadata(),
    }
    return Metadata(tensors, storage_data={MetadataIndex("object", index=0): _StorageInfo(relative_path, 0, length)})


def test_metadata_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(pickle.dumps(_metadata()))
    assert safe_unpickle.read_metadata(tmp_path) == _metadata()


@pytest.mark.parametrize("place", ["alone", "inside real metadata"])
def test_metadata_that_would_run_a_command_is_refused_before_it_runs(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "marker"
    content: object = _Command(marker)
    if place != "alone":
        content = _metadata()
        content.planner_data = _Command(marker)
    (tmp_path / METADATA).write_bytes(pickle.dumps(content))
    with pytest.raises(UnsafePickle, match="system"):
        safe_unpickle.read_metadata(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "torch.load", "torch.serialization.load", "torch.nn.Module"]
)
def test_metadata_may_name_nothing_but_its_own_classes(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (tmp_path / METADATA).write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UnsafePickle, match=name):
        safe_unpickle.read_metadata(tmp_path)


def test_metadata_that_is_no_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsafePickle, match="dict"):
        safe_unpickle.read_metadata(tmp_path)
    (tmp_path / METADATA).write_bytes(pickle.dumps(_metadata())[:-20])
    with pytest.raises(Unreadable, match=METADATA):
        safe_unpickle.read_metadata(tmp_path)


def _with_object(directory: Path, content: object) -> None:
    torch.save([content], directory / "__0_0.distcp")
    length = (directory / "__0_0.distcp").stat().st_size
    (directory / METADATA).write_bytes(pickle.dumps(_metadata(length=length)))


@pytest.mark.parametrize("place", ["__0_0.distcp", COMMON])
def test_an_object_that_would_run_a_command_is_refused_before_it_runs(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "marker"
    names = {METADATA, "__0_0.distcp", COMMON}
    contents = {name: _Command(marker) if name == place else {"plain": (1, 2.0, "three", torch.ones(2))} for name in names}
    _with_object(tmp_path, contents["__0_0.distcp"])
    torch.save(contents[COMMON], tmp_path / COMMON)
    with pytest.raises(UnsafePickle, match=place):
        safe_unpickle.check_pickles(tmp_path, names)
    assert not marker.exists()


def test_plain_objects_pass(tmp_path: Path) -> None:
    _with_object(tmp_path, {"plain": (1, 2.0, "three", torch.ones(2), torch.bfloat16)})
    safe_unpickle.check_pickles(tmp_path, {METADATA, "__0_0.distcp"})


@pytest.mark.parametrize("elsewhere", ["../other/__0_0.distcp", "/etc/hostname", "__1_0.distcp"])
def test_metadata_that_points_outside_the_checkpoint_is_refused(tmp_path: Path, elsewhere: str) -> None:
    (tmp_path / METADATA).write_bytes(pickle.dumps(_metadata(relative_path=elsewhere)))
    with pytest.raises(UnsafePickle, match="no file of the checkpoint"):
        safe_unpickle.check_pickles(tmp_path, {METADATA, "__0_0.distcp"})


def test_checksums_are_plain_json_for_other_tools(directory: Path) -> None:
    files = json.loads((directory / CHECKSUMS).read_bytes())["files"]
    assert files["shards/a"]["size"] == 256 and len(files["shards/a"]["sha256"]) == 64
