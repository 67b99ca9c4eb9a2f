"""What a tool writes is one process's at a time, and replaces nothing unless a flag says so. Standard library alone.

`OUTPUT.lock` lies beside the output while it is written. The kernel gives it free when its process ends, however that is, so one that a
kill left behind is nobody's. On a file system without locks it is the user's word.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_salt.errors import UserError


def refuse_present(flag_name: str, output: str | Path, paths: Iterable[Path], overwrite: bool) -> None:
    """Raise UserError where one of `paths`, which `output` stands for, exists and may not be replaced."""
    present = [str(path) for path in paths if os.path.lexists(path)]
    if present and not overwrite:
        raise UserError(f"{flag_name} {output}: {', '.join(present)} exists; --overwrite replaces it")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name for what becomes `path` when it is written. Whatever goes wrong, `path` stays as it was and nothing is left."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise


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
