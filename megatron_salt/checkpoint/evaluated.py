"""`evaluated.json` in a checkpoint: the evaluation after its step is done, and what it decided. Standard library alone.

A checkpoint is saved before the evaluation at its step, and its state.json says that this one is due. The file is added afterwards,
whole or not at all. Without it, a resumed run begins with the evaluation and comes to the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_salt.checkpoint.integrity import DamagedCheckpoint, write_whole
from megatron_salt.checkpoint.run_state import EVALUATION_DUE, Progress
from megatron_salt.small_files import read_json

NAME = "evaluated.json"


def write(directory: Path, progress: Progress) -> None:
    """Add the file. `progress` is that of the checkpoint, after the evaluation. Raises OSError."""
    decided = {"step": progress.step, "salt": None if progress.salt is None else asdict(progress.salt)}
    write_whole(directory / NAME, json.dumps({"decided": decided, "sha256": _sum(decided)}).encode())


def with_evaluation(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """`facts`, state.json of a checkpoint, as they are after its evaluation; unchanged where the file is absent.

    Raises DamagedCheckpoint where the file is not what was written."""
    path = directory / NAME
    try:
        written = read_json(path, nan=True)
        decided = written["decided"]
        if written["sha256"] != _sum(decided) or decided["step"] != facts["step"]:
            raise ValueError("its contents are not what was written")
    except FileNotFoundError:
        return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({error}); without the file a resumed run repeats the evaluation"
        ) from None
    return facts | {"salt": decided["salt"], "extra": {**facts["extra"], EVALUATION_DUE: False}}


def _sum(decided: Any) -> str:
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
