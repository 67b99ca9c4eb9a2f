"""An output appears whole or not at all: a full disk, Ctrl-C and errors in the middle leave nothing, not even new folders."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from megatron_salt.convert.checkpoint_writer import whole_directory
from megatron_salt.convert.tensor_files import Piece, write_tensors
from megatron_salt.errors import UserError


def _no_space() -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _damaged() -> BaseException:
    return UserError("x: a tensor is damaged")


class Failing(io.FileIO):
    """A file whose writes fail after its first KiB."""

    fault: Callable[[], BaseException]

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > 1024:
            raise self.fault()
        return super().write(data) or 0


def pieces(load: Callable[[], torch.Tensor]) -> list[Piece]:
    return [Piece(key=key, size=(999,), offsets=(0,), shape=(999,), dtype=torch.float32, load=load) for key in "abc"]


@pytest.mark.parametrize("fault, expected", [(_no_space, OSError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_what_ends_a_write_comes_out_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], BaseException], expected: type[BaseException]
) -> None:
    """torch's zip file would raise an error of its own, with a traceback. A full disk is told with a name that the tool can print."""

    @contextlib.contextmanager
    def stream(self: object, path: str | os.PathLike[str], mode: str) -> Iterator[Failing]:
        with Failing(path, mode) as file:
            file.fault = fault
            yield file

    monkeypatch.setattr(filesystem.FileSystem, "create_stream", stream)
    with pytest.raises(expected) as error, whole_directory("--to", tmp_path / "new" / "out") as partial:
        write_tensors(partial, pieces(lambda: torch.ones(999)), lambda piece: None)
    if isinstance(error.value, OSError):
        assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "new" / "out.partial")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_leaves_nothing(tmp_path: Path) -> None:
    def load() -> torch.Tensor:
        raise _damaged()

    (tmp_path / "old").mkdir()
    with (
        pytest.raises(UserError, match="a tensor is damaged"),
        whole_directory("--to", tmp_path / "old" / "a" / "out") as partial,
    ):
        write_tensors(partial, pieces(load), lambda piece: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_an_earlier_try_left_is_removed_and_no_more(tmp_path: Path, what: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    left = tmp_path / "out.partial"
    if what == "folder":
        (left / "deep").mkdir(parents=True)
    elif what == "file":
        left.write_text("")
    else:
        left.symlink_to(tmp_path / "precious")
    with whole_directory("--to", tmp_path / "out") as partial:
        (partial / "whole").write_text("")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "out",
        "out/whole",
        "precious",
        "precious/file",
    ]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--to .*out exists"), whole_directory("--to", tmp_path / "out"):
        (tmp_path / "out").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "mine"
