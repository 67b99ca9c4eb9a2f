"""Files appear whole; outputs are replaced only where a flag says so, and written by one process at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_salt.errors import UserError
from megatron_salt.files import (
    real_path,
    refuse_present,
    refusing_file_errors,
    sole_writer,
    whole_file,
    whole_files,
    write_whole,
)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_has_its_old_content_until_the_new_one_is_complete(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old", durable)
    with whole_file(path, durable) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old" and temporary == tmp_path / "file.tmp"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_stands_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with pytest.raises(type(error)), whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass  # nothing was written
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_several_files_are_new_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    with whole_files(paths) as temporary:
        for file in temporary:
            file.write_text("new")
    (tmp_path / "a").write_text("old")
    with pytest.raises(IsADirectoryError, match="b"), whole_files(paths) as temporary:
        for file in temporary:
            file.write_text("newer")
        (tmp_path / "b").unlink()
        (tmp_path / "b").mkdir()  # while the block writes
    with pytest.raises(IsADirectoryError), whole_files(paths):
        pytest.fail("nothing is begun")
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"a": "old", "c": "new"}


@pytest.mark.parametrize("durable, expected", [(False, ["rename own"]), (True, ["sync own", "rename own", "sync DIRECTORY"])])
def test_a_durable_file_is_on_the_disk_before_its_name_and_its_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, expected: list[str]
) -> None:
    """Under a temporary name of the caller's choice."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append(f"rename {os.path.basename(source)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with whole_file(tmp_path / "file", durable, temporary=tmp_path / "own") as temporary:
        temporary.write_bytes(b"new")
    assert calls == [call.replace("DIRECTORY", tmp_path.name) for call in expected]


def test_a_write_that_fails_names_its_file_in_one_line(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=f"{tmp_path}/file cannot be read or written: No space left")
    with refused, refusing_file_errors(), whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "file"
    other.write_text("of somebody else")
    (tmp_path / "file.tmp").symlink_to(other)
    write_whole(path, b"new")
    assert (other.read_text(), path.read_text(), path.is_symlink()) == ("of somebody else", "new", False)


def test_the_real_path_has_no_links_and_one_that_leads_to_itself_is_kept(tmp_path: Path) -> None:
    (tmp_path / "name").symlink_to(tmp_path / "there")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert real_path(tmp_path / "name" / "file") == real_path(tmp_path) / "there" / "file"
    assert real_path(tmp_path / "itself").name == "itself"


def test_what_is_there_is_replaced_only_where_a_flag_says_so(tmp_path: Path) -> None:
    here, link, absent = tmp_path / "here", tmp_path / "link", tmp_path / "absent"
    here.write_text("")
    link.symlink_to(absent)  # writing would replace the link
    with pytest.raises(UserError, match=f"--output x: {here}, {link} exists; --overwrite replaces it"):
        refuse_present("--output", "x", [here, absent, link], overwrite=False)
    refuse_present("--output", "x", [here, absent], overwrite=True)
    refuse_present("--output", "x", [absent], overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fifo_or_device_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(UserError, match=f"^--output x: {path} is not a regular file; give another --output$"):
            refuse_present("--output", "x", [tmp_path / "absent", path], overwrite)


def test_a_second_writer_is_refused_naming_the_first_and_the_directory_is_clean_afterwards(tmp_path: Path) -> None:
    output = tmp_path / "new/model"
    with sole_writer("--output", output):
        with pytest.raises(UserError) as refused, sole_writer("--output", output):
            pass
        for part in (f"--output {output} is being written by process {os.getpid()} on ", "another --output"):
            assert part in str(refused.value)
        with sole_writer("--output", tmp_path / "other"):
            pass
    assert list(output.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), sole_writer("--output", output):
        raise ZeroDivisionError
    assert list(output.parent.iterdir()) == []


def test_a_lock_of_a_killed_process_is_nobodys(tmp_path: Path) -> None:
    code = "import os, sys\nfrom megatron_salt.files import sole_writer\n"
    code += "with sole_writer('--output', sys.argv[1]): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False)
    assert (tmp_path / "model.lock").exists()
    with sole_writer("--output", tmp_path / "model"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_come_and_go_one_holds_the_output_at_a_time(tmp_path: Path) -> None:
    """Each process reads a number and adds to it. If a lock were removed while another process opens it, an addition would be lost."""
    code = """
import sys, time
from pathlib import Path
from megatron_salt.files import sole_writer
from megatron_salt.errors import UserError
number, done = Path(sys.argv[1]), 0
while done < 100:
    try:
        with sole_writer('--output', number):
            found = int(number.read_text())
            time.sleep(0.0001)
            number.write_text(str(found + 1))
            done += 1
    except UserError:
        time.sleep(0.0002)
"""
    (tmp_path / "number").write_text("0")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "number")]) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "300"
