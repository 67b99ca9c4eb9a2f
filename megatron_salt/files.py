"""Files that appear whole, and outputs that one process writes at a time. Standard library alone.

A file is written under a temporary name beside its own, and renamed when it is complete: whoever reads sees the old file or the new
one. With `durable`, the new one also survives a loss of power. While a tool writes OUTPUT it holds a lock on `OUTPUT.lock`. The kernel
releases the lock when the process ends, also after a kill. On a file system without locks the user must not start two writers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from megatron_salt.errors import HOST_FAULTS, UserError, file_error

_OF_ANY_FILE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}) | HOST_FAULTS
"""Errors that any file may have: permissions, a full disk, a name that is too long, a disk or a server that fails. They are not bugs."""


@contextlib.contextmanager
def reading(path: str | Path, told: str = "") -> Iterator[None]:
    """Turn an OSError of the block, which reads one file, into one line that names it, see `file_error`.

    told: begins the line, such as the flag that named the file.
    """
    try:
        yield
    except OSError as error:
        raise file_error(f"{told}{path} cannot be read: {error.strerror or error}", error) from error


@contextlib.contextmanager
def refusing_file_errors() -> Iterator[None]:
    """Turn an OSError that names a file, and that any file may have, into one line, see `file_error`. For the outermost block alone."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_ANY_FILE or error.filename is None:
            raise
        raise file_error(f"{error.filename} cannot be read or written: {error.strerror}", error) from error


def refuse_present(flag_name: str, output: str | Path, paths: Collection[Path], overwrite: bool) -> None:
    """Raise UserError if one of `paths`, which `output` stands for, exists and may not be replaced.

    A device, a FIFO or a socket may never be replaced.
    """
    for path in paths:
        if os.path.lexists(path) and not _is_replaceable(path):
            raise UserError(f"{flag_name} {output}: {path} is not a regular file; give another {flag_name}")
    present = [str(path) for path in paths if os.path.lexists(path)]
    if present and not overwrite:
        raise UserError(f"{flag_name} {output}: {', '.join(present)} exists; --overwrite replaces it")


def refuse_directory(flag_name: str, output: Path) -> None:
    """Raise UserError if `output`, the name of a file, is a directory: no --overwrite replaces it."""
    if output.is_dir():
        raise UserError(f"{flag_name} {output} is a directory; give the name of a file")


def _is_replaceable(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = False, temporary: Path | None = None) -> Iterator[Path]:
    """The name under which to write `path`; it gets its own name when the block ends. After an error `path` is as before.

    durable: the file and its name are on the disk before this returns. temporary: another name than PATH.tmp, in the same directory,
    such as one of this process alone. After an error no temporary file is left; after a kill one may be.
    """
    temporary = path.with_name(path.name + ".tmp") if temporary is None else temporary
    if temporary.is_symlink():  # or its target would be overwritten
        temporary.unlink()
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write does not name its file, see `refusing_file_errors`
        raise


@contextlib.contextmanager
def whole_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """`whole_file` for several files: all get their names when the block ends, or none does.

    Raises IsADirectoryError where a directory stands in the place of one, before and after the block. Only a kill between two renames
    leaves some new and some old.
    """
    _refuse_directories(paths)
    with contextlib.ExitStack() as files:
        yield [files.enter_context(whole_file(path)) for path in paths]
        _refuse_directories(paths)


def _refuse_directories(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def write_whole(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file so that it appears whole or not at all: see `whole_file`. Raises OSError."""
    with whole_file(path, durable) as temporary:
        temporary.write_bytes(content)


def real_path(path: str | Path) -> Path:
    """The absolute path without links. A link that leads to itself stays a path, where `Path.resolve` raises RuntimeError."""
    return Path(os.path.realpath(path))


def sync(path: Path) -> None:
    """Put a file's content, or the names in a directory, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sole_writer(flag_name: str, output: str | Path) -> Iterator[None]:
    """Hold `output`, whose directory is made. UserError, naming the process, while another one holds it; OSError where it cannot be."""
    path = Path(f"{output}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(flag_name, output, path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed or its process ends; False while another process holds the lock.

    True also where the file system has no locks: the user then must not start two writers.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _lock(flag_name: str, output: str | Path, path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not try_lock(descriptor):
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"{flag_name} {output} is being written by {holder} ({path}); wait for its end, or give another {flag_name}"
            )
        with contextlib.suppress(FileNotFoundError):  # else its last holder removed it after it was opened here
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)
