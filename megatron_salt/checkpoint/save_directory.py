"""What lies in a directory of checkpoints, which of it is whole, and which checkpoint to load.

A save is written to `iter_0000100.partial`, and renamed to `iter_0000100` once every byte of it is on the disk. Only then does
`latest_checkpointed_iteration.txt` (Megatron's name) move. So a directory named iter_* is whole, at whatever instant a crash came, and
everything else with one of our suffixes is a leftover. Where a step is saved again, the old checkpoint is called `.replaced` until the new
one has its name. Standard library only; nothing here communicates: one rank writes, any may read.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from megatron_salt.errors import UserError
from megatron_salt.files import sync, write_whole
from megatron_salt.small_files import read_small

TRACKER = "latest_checkpointed_iteration.txt"
STATE = "state.json"
RUN_YAML = "run.yaml"
TOKENIZER = "tokenizer"
"""A directory in a checkpoint: the files of the run's tokenizer."""
_TRACKER_BYTES = 64

_PARTIAL, _REPLACED, _DELETING = ".partial", ".replaced", ".deleting"
_NAME = re.compile(r"iter_(\d{7,})(\.partial|\.replaced|\.deleting)?")


def directory_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is whole."""
    return root / f"iter_{step:07d}"


def partial_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies while it is being written."""
    return root / f"iter_{step:07d}{_PARTIAL}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return _parse(path)[0]


def whole_checkpoints(root: Path) -> dict[int, Path]:
    """Every whole checkpoint under `root`, by step."""
    checkpoints: dict[int, Path] = {}
    for path in _entries(root):
        step, suffix = _parse(path)
        if suffix is None or (suffix == _REPLACED and path.is_dir() and not directory_of(root, step).exists()):
            checkpoints[step] = path
    return dict(sorted(checkpoints.items()))


def read_tracker(root: Path, flag_name: str = "--load") -> int | None:
    """The step that the tracker names; None where there is no tracker. flag_name: the flag that gave `root`.

    Raises UserError where the tracker cannot be read or names no step.
    """
    path = root / TRACKER
    try:
        word = read_small(path, _TRACKER_BYTES).decode("ascii").strip()
        if not word.isdecimal():
            raise ValueError(word)
        return int(word)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(
            f"{path} does not hold the number of a step; put there the step of a whole iter_* directory beside it, "
            f"or give that directory to {flag_name}"
        ) from None


def write_tracker(root: Path, step: int) -> None:
    """Let the tracker name this step, durably. Raises OSError."""
    write_whole(root / TRACKER, f"{step}\n".encode("ascii"), durable=True)


def candidates(load: Path, fallback: bool = False, flag_name: str = "--load") -> list[Path]:
    """The checkpoints that --load (`flag_name`) can mean: first the one to try first, then earlier ones. Empty: there is none.

    `load` is a directory of checkpoints or one iter_* directory. Without a tracker the highest step comes first. Raises UserError where
    the tracker names a checkpoint that is not there, unless `fallback`: then, too, the highest step comes first.
    """
    if _NAME.fullmatch(load.name) and load.is_dir():
        step, suffix = _parse(load)
        if suffix in (_PARTIAL, _DELETING):
            raise UserError(f"{flag_name} {load}: a save that was never finished; its beginning is not a checkpoint")
        return [load, *_before(load.parent, step)]
    whole = whole_checkpoints(load)
    try:
        latest = read_tracker(load, flag_name)
    except UserError:
        if not fallback:
            raise
        latest = None
    if latest is None or (fallback and latest not in whole):
        return list(reversed(whole.values()))
    if latest not in whole:
        others = ", ".join(path.name for path in whole.values()) or "none"
        raise UserError(
            f"{load / TRACKER} names step {latest}, and {directory_of(load, latest)} is not there; "
            f"whole checkpoints: {others}. Give one of them to {flag_name}"
        )
    return [whole[latest], *_before(load, latest)]


def publish(root: Path, step: int) -> Path:
    """Give a complete save its final name and move the tracker. Its files must be on the disk already. Raises OSError."""
    written, final = partial_of(root, step), directory_of(root, step)
    sync(written)
    replaced = final.with_name(final.name + _REPLACED)
    if os.path.lexists(final):
        if os.path.lexists(replaced):
            delete(replaced)
        os.rename(final, replaced)
    os.rename(written, final)
    sync(root)
    write_tracker(root, step)
    if os.path.lexists(replaced):
        with contextlib.suppress(OSError):  # the save is whole; `make_room` tries again, and reports
            delete(replaced)
    return final


def unfinished(root: Path) -> list[Path]:
    """The leftovers that `tidy` would delete."""
    return [path for path in _entries(root) if _parse(path)[1] in (_PARTIAL, _DELETING)]


def tidy(root: Path) -> list[str]:
    """Remove the leftovers of crashed runs; put a replaced checkpoint back where its successor was never finished.

    Returns a line for each thing done, and for each leftover that cannot be removed: that one stays and does no harm.
    """
    done = []
    for path in _entries(root):
        step, suffix = _parse(path)
        final = directory_of(root, step)
        if suffix == _REPLACED and path.is_dir() and not os.path.lexists(final):
            os.rename(path, final)
            done.append(f"restored {final.name}, whose replacement was never finished")
        elif suffix is not None:
            problem = _try(partial(_remove, path))
            done.append(f"removed {path.name}, left over from an unfinished run" if problem is None else _stays(path, problem))
    (root / (TRACKER + ".tmp")).unlink(missing_ok=True)
    return done


def make_room(root: Path, surplus: Iterable[int]) -> list[str]:
    """Delete the checkpoints of these steps (retention.py), and what earlier deletions could not remove.

    Returns a line for each that cannot be deleted. A checkpoint that is a symbolic link is unlinked; its target stays.
    """
    doomed = []
    for path in _entries(root):
        step, suffix = _parse(path)
        if suffix == _DELETING or (suffix == _REPLACED and directory_of(root, step).exists()):
            doomed.append(path)
    whole = whole_checkpoints(root)
    doomed += [whole[step] for step in surplus]
    return [_stays(path, problem) for path in doomed if (problem := _try(partial(delete, path))) is not None]


def delete(path: Path) -> None:
    """Delete a checkpoint. A crash in the middle leaves a leftover with our suffix, never half a checkpoint. Raises OSError."""
    step, suffix = _parse(path)
    doomed = directory_of(path.parent, step)
    doomed = doomed.with_name(doomed.name + _DELETING)
    if suffix != _DELETING:
        if os.path.lexists(doomed):
            _remove(doomed)
        os.rename(path, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Remove a directory with its contents, a file, or a symbolic link without its target."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _try(action: Callable[[], None]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


def _stays(path: Path, problem: OSError) -> str:
    return f"{path} cannot be deleted ({problem}); the next save tries again"


def _before(root: Path, step: int) -> list[Path]:
    return [path for earlier, path in reversed(whole_checkpoints(root).items()) if earlier < step]


def _entries(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if (match := _NAME.fullmatch(path.name)) and (match[2] or path.is_dir()))


def _parse(path: Path) -> tuple[int, str | None]:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), match[2]


def how_to_import(load: Path) -> str:
    """The end of a message about a path that holds no checkpoint: what makes one of an open model; empty where it is none."""
    if load.suffix == ".gguf" and load.is_file():
        return f"; salt-convert import --from gguf {load} --to OUT makes one of this model"
    if (load / "config.json").is_file():
        return f"; salt-convert import {load} --to OUT makes one of this model"
    return ""
