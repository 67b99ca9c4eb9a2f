"""The sinks of a run's numbers: a JSONL file, TensorBoard, Weights & Biases.

A sink takes entries: flat dicts with `kind` ("step", "eval", "task" or "event"), `step`, and numbers. A run that crashed resumes at an
earlier step. Every sink then drops its entries of later steps, so that a curve has one value a step.

One rank alone opens sinks. A missing package, or a path that can never be written, is a UserError. A disk that is full or read-only, or a
server that does not answer, may raise anything; retrying_sink.py tries again. An entry is written once `write` has returned.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_salt.errors import UserError
from megatron_salt.files import whole_file
from megatron_salt.small_files import parse_json

Entry = Mapping[str, Any]

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
"""Errors that may be over later. Any other error means that the path is wrong."""

_LONGEST_LINE = 1 << 24  # bytes; the longest entries have some hundred thousand


class Sink(Protocol):
    """Takes entries in the order of their steps."""

    name: str

    def write(self, entry: Entry) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """One JSON object a line, each line appended by one write. nan and inf become null."""

    name = "--jsonl"

    def __init__(self, path: Path, start_step: int) -> None:
        """Continue `path` after `start_step`. A run from step 0 renames an older log: PATH.old, PATH.old2... Raises UserError, OSError."""
        self._unwritten = b""
        try:
            look_at_jsonl(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                if start_step == 0:
                    os.rename(path, _free_name_for_old(path))
                else:
                    drop_later_steps(path, start_step)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise unusable(f"--jsonl {path}", error) from error

    def write(self, entry: Entry) -> None:
        self.flush()  # the rest of a line of which the disk took a part
        line = json.dumps(_finite(entry), allow_nan=False).encode() + b"\n"
        self._unwritten = line[self._file.write(line) :]

    def flush(self) -> None:
        self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        with self._file:
            self._file.write(self._unwritten)


def _free_name_for_old(path: Path) -> Path:
    """PATH.old, or PATH.old2 and so on: a log that is there already stays."""
    names = itertools.chain([".old"], (f".old{number}" for number in itertools.count(2)))
    return next(old for name in names if not os.path.lexists(old := path.with_name(path.name + name)))


def look_at_jsonl(path: Path) -> None:
    """Raise UserError where `path` holds something that no run wrote, or where a file is in the way to it.

    Raises OSError where it cannot be read. Nothing is written.
    """
    refuse_in_the_way(path.parent, f"--jsonl {path}")
    if not path.exists():
        return
    if not path.is_file():  # a pipe or a device cannot be cut back, and none should be renamed
        raise UserError(f"--jsonl {path} is not a regular file; name another one")
    with open(path, "rb") as file:
        line = file.readline(_LONGEST_LINE)
    torn = line.startswith(b'{"') and not line.endswith(b"\n")
    if line and _step_of(line) is None and not torn:
        raise UserError(f"--jsonl {path} exists and is not a run's log (its first line has no step); name another file")


def drop_later_steps(path: Path, last_step: int) -> None:
    """Remove entries of steps after `last_step`, and lines that a crash cut off, from a run's JSONL file.

    The file is replaced as a whole, or stays as it was.
    """
    with whole_file(path, durable=True) as temporary, open(path, "rb") as old, open(temporary, "wb") as new:
        for line in old:
            step = _step_of(line)
            if step is not None and step <= last_step:
                new.write(line)


def _step_of(line: bytes) -> int | None:
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    step = entry.get("step") if isinstance(entry, dict) and line.endswith(b"\n") else None
    return step if isinstance(step, int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(entry: Entry) -> dict[str, float]:
    """{name of a curve: value} for an entry's numbers: train/loss, time/data, valid/loss, valid-NAME/loss of a named set,
    task-NAME/acc of a task ...

    What stands before the first slash is a group of curves in TensorBoard and Weights & Biases.

    train/loss is the cross entropy with the data in both stages, so the curve does not jump at the end of stage 1. The loss that
    stage 1 minimises, against the mixed target, is train/mixed_loss.
    """
    own_name = str(entry.get("name")).replace("/", "-")
    prefix = {"step": "train", "eval": own_name, "task": f"task-{own_name}", "event": "event"}[entry["kind"]]
    curves = {
        f"{prefix}/{key}": float(value)
        for key, value in entry.items()
        if isinstance(value, (int, float)) and key not in ("step", "time")
    }
    if "ce" in entry:
        curves |= {f"{prefix}/loss": float(entry["ce"]), f"{prefix}/mixed_loss": float(entry["loss"])}
        del curves[f"{prefix}/ce"]
    return curves | {f"time/{phase}": float(seconds) for phase, seconds in entry.get("phases", {}).items()}


class TensorBoard:
    """Scalars in a TensorBoard directory."""

    name = "--tensorboard-dir"

    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make_directory(directory, self.name)
        try:
            self._writer = SummaryWriter(str(directory), purge_step=start_step + 1)
        except OSError as error:
            raise unusable(f"{self.name} {directory}", error) from error

    def write(self, entry: Entry) -> None:
        for curve, value in scalars(entry).items():
            self._writer.add_scalar(curve, value, entry["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Scalars in a Weights & Biases run. A resumed run with a name continues the run of that name."""

    name = "--wandb-project"

    def __init__(self, project: str, run_name: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        run_id = None if run_name is None else wandb_id(run_name)
        self._run = wandb.init(project=project, name=run_name, id=run_id, resume="allow", config=dict(config))

    def write(self, entry: Entry) -> None:
        self._run.log(scalars(entry), step=entry["step"])

    def flush(self) -> None:
        """Nothing to do: the process of Weights & Biases has every entry already."""

    def close(self) -> None:
        self._run.finish()


def wandb_id(run_name: str) -> str:
    """The run id for a name: the name itself where Weights & Biases takes it, else its valid characters and a hash."""
    if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", run_name):
        return run_name
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', run_name)[:48]}-{hashlib.sha256(run_name.encode()).hexdigest()[:8]}"


def make_directory(directory: Path, flag_name: str) -> None:
    """Make a directory unless it exists. Raises UserError, or an OSError that may be over later."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(f"{flag_name} {directory}", error) from error


def refuse_in_the_way(directory: Path, what: str) -> None:
    """Raise UserError where a file stands in the place of `directory` or of one of its parents. Nothing is written."""
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{what} cannot be written: {existing} is not a directory")


def unusable(what: str, error: OSError) -> Exception:
    """The error itself where it may be over later, else a UserError that says what cannot be written."""
    return error if error.errno in PASSING else UserError(f"{what} cannot be written: {error}")


def require_package(package: str, flag_name: str) -> None:
    """Raise UserError where `package` cannot be imported. Cheap, so every rank calls it and all refuse together."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{flag_name} needs the package {package}, which is not installed; try: pip install {package}")
