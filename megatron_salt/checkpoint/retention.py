"""Which checkpoints of --save a run may delete, and whether it may start there at all.

--keep-last goes by step and lineage (lineage.py) alone. Other runs' checkpoints, abandoned branches, named ones and those that
cannot be read are never deleted. Standard library only; rank 0 calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_salt.checkpoint import lineage, save_directory
from megatron_salt.checkpoint.lineage import Lineage
from megatron_salt.config import CheckpointConfig
from megatron_salt.errors import UserError
from megatron_salt.small_files import read_json


@dataclass(frozen=True)
class Saved:
    """One whole checkpoint, by its state.json."""

    step: int
    name: str | None
    """Named checkpoints are kept; routine ones (None) make room for newer ones."""
    lineage: Lineage


def saved_under(root: Path) -> list[Saved]:
    """Every whole checkpoint, by step; nobody's where its state cannot be read."""
    return [_saved(path, step) for step, path in save_directory.whole_checkpoints(root).items()]


def surplus(saved: Sequence[Saved], keep_last: int, latest: int, mine: Lineage) -> list[int]:
    """The steps to delete so that `keep_last` routine checkpoints of this run stay. latest: the step just saved. Pure."""
    own = sorted(one.step for one in saved if one.name is None and lineage.is_ancestor(one.lineage, one.step, mine, latest))
    return [step for step in own[:-keep_last] if step != latest]


def look(checkpoint: CheckpointConfig) -> None:
    """Refuse what `begin` will, before anything is loaded or written. What is wrong with --load itself is for the loading to tell."""
    if checkpoint.save is None:
        return
    found = None
    if checkpoint.load is not None and not checkpoint.finetune:
        paths = save_directory.candidates(Path(checkpoint.load), checkpoint.load_fallback)
        if paths:
            try:
                facts = read_json(paths[0] / save_directory.STATE, nan=True)
                found = (paths[0], {"step": int(facts["step"]), "lineage": facts.get("lineage", lineage.UNNAMED)})
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return
    begin(checkpoint, found)


def begin(checkpoint: CheckpointConfig, found: tuple[Path, Mapping[str, Any]] | None) -> Lineage:
    """The lineage of a run that starts into --save. found: the checkpoint that it goes on from and its facts; None: it starts at step 0.

    Raises UserError where --save holds checkpoints that the run does not come from, and no flag says that this is meant.
    """
    assert checkpoint.save is not None
    save = Path(checkpoint.save)
    there = saved_under(save)
    in_place = found is not None and found[0].parent.resolve() == save.resolve()
    if found is None:
        mine, at = lineage.fresh(), 0
    else:
        at = found[1]["step"]
        mine = lineage.resumed(lineage.lineage_in(found[1]), at, in_place, ((one.lineage, one.step) for one in there))
    foreign = [one.step for one in there if not lineage.is_ancestor(one.lineage, one.step, mine, at)]
    if foreign and not in_place and not checkpoint.overwrite_save:
        raise UserError(_refusal(checkpoint, foreign, found is not None))
    return mine


def of_one_run(candidates: Sequence[Path]) -> list[Path]:
    """The first of these checkpoints and those that it comes from; all of them where its own state cannot be read."""
    saved = [_saved(path, save_directory.step_of(path)) for path in candidates]
    if not saved or not saved[0].lineage:
        return list(candidates)
    first = saved[0]
    return [
        path
        for path, one in zip(candidates, saved, strict=True)
        if one is first or not one.lineage or lineage.is_ancestor(one.lineage, one.step, first.lineage, first.step)
    ]


def _saved(path: Path, step: int) -> Saved:
    try:
        state = read_json(path / save_directory.STATE, nan=True)
        return Saved(step, state["name"], lineage.lineage_in(state))
    except (OSError, ValueError, KeyError, TypeError):
        return Saved(step, None, ())


def _refusal(checkpoint: CheckpointConfig, foreign: Sequence[int], resumed: bool) -> str:
    save, first, last = Path(str(checkpoint.save)), min(foreign), max(foreign)
    names = save_directory.directory_of(save, first).name + (
        "" if first == last else f" to {save_directory.directory_of(save, last).name}"
    )
    whose = f"that the one of --load {checkpoint.load} does not come from" if resumed else "of another run"
    fresh = "" if resumed else ", and this one starts at step 0"
    go_on = f"--load {save}{' without --finetune' if checkpoint.finetune else ''} goes on from them"
    return (
        f"--save {save} holds checkpoints {whose} ({len(foreign)}: {names}){fresh}: {go_on}, another --save leaves them alone, and "
        "--overwrite-save lets this run replace those whose steps it reaches"
    )
