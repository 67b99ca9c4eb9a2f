"""Which checkpoints of --save belong to a run: which it may delete, and whether it may start there at all.

Every checkpoint records its lineage. A fresh start has a random id, and whoever resumes goes on under it. A start that would continue a
checkpoint a second time, after a rewind or into another --save, branches off with an id of its own. So `[["a", 0], ["b", 10]]` in the
checkpoint of step 30 says: run a up to step 10, then run b. Steps of a after 10 are an abandoned branch. Neither clocks nor names of
directories count. --keep-last deletes by lineage and step alone: never another run's checkpoint, an abandoned branch, a named
one, or one that cannot be read. Standard library only; rank 0 calls.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_salt.checkpoint import save_directory
from megatron_salt.checkpoint.run_state import UNNAMED, Lineage, lineage_in
from megatron_salt.config import CheckpointConfig
from megatron_salt.errors import UserError
from megatron_salt.files import real_path
from megatron_salt.small_files import read_json

# ---- lineages ----------------------------------------------------------------------------------------------------------


def fresh() -> Lineage:
    """The lineage of a run that starts at step 0."""
    return ((uuid.uuid4().hex, 0),)


def is_ancestor(saved: Lineage, step: int, own: Lineage, reached: int) -> bool:
    """Whether the run with lineage `own` wrote or resumed from this checkpoint on its way to step `reached`.

    `saved` and `step` are the checkpoint's.
    """
    if not saved or saved != own[: len(saved)]:
        return False
    return step <= (own[len(saved)][1] if len(saved) < len(own) else reached)


def resumed(saved: Lineage, step: int, in_place: bool, others: Iterable[tuple[Lineage, int]]) -> Lineage:
    """The lineage of a run that goes on from a checkpoint; `saved` and `step` are the checkpoint's.

    in_place: --save is where the checkpoint lies; `others` are lineage and step of everything else there. Checkpoints without a
    lineage count as the run's own only where it resumed from one of them in place.
    """
    if in_place and saved not in ((), UNNAMED) and not any(_goes_on(saved, step, *other) for other in others):
        return saved
    if not in_place:
        saved = tuple(entry for entry in saved if entry[0])
        saved = (*((name, 0) for name, _ in saved[:1]), *saved[1:])
    return (*saved, (uuid.uuid4().hex, step if saved else 0))


def _goes_on(saved: Lineage, step: int, other: Lineage, reached: int) -> bool:
    """Whether `other`, at step `reached`, continued the same branch beyond `step`."""
    return other[: len(saved)] == saved and (other[len(saved)][1] if len(other) > len(saved) else reached) > step


# ---- what lies in --save -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """One whole checkpoint, by its state.json."""

    step: int
    name: str | None
    """Named checkpoints are kept; routine ones (None) make room for newer ones."""
    lineage: Lineage


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from."""

    directory: Path
    step: int
    lineage: Lineage


def saved_under(root: Path) -> list[Saved]:
    """Every whole checkpoint, by step; without a lineage where its state cannot be read."""
    return [_saved(path, step) for step, path in save_directory.whole_checkpoints(root).items()]


def surplus(saved: Sequence[Saved], keep_last: int, latest: int, own: Lineage) -> list[int]:
    """The steps to delete so that `keep_last` routine checkpoints of this run stay. latest: the step just saved. Pure."""
    steps = sorted(one.step for one in saved if one.name is None and is_ancestor(one.lineage, one.step, own, latest))
    return [step for step in steps[:-keep_last] if step != latest]


def refuse_foreign(checkpoint: CheckpointConfig) -> None:
    """Raise UserError where `begin` will, before anything is loaded or written. A damaged --load is left for the loading to report."""
    if checkpoint.save is None:
        return
    origin = None
    if checkpoint.load is not None and not checkpoint.finetune:
        paths = save_directory.candidates(Path(checkpoint.load), checkpoint.load_fallback)
        if paths:
            try:
                content = read_json(paths[0] / save_directory.STATE, nan=True)
                origin = Origin(paths[0], int(content["step"]), lineage_in(content))
            except (OSError, ValueError, KeyError, TypeError):
                return
    begin(checkpoint, origin)


def begin(checkpoint: CheckpointConfig, origin: Origin | None) -> Lineage:
    """The lineage of a run that starts into --save; no origin: it starts at step 0.

    Raises UserError where --save holds checkpoints that the run does not come from, and no flag says that this is meant.
    """
    assert checkpoint.save is not None
    save = Path(checkpoint.save)
    present = saved_under(save)
    in_place = origin is not None and real_path(origin.directory.parent) == real_path(save)
    if origin is None:
        own, reached = fresh(), 0
    else:
        reached = origin.step
        own = resumed(origin.lineage, reached, in_place, ((one.lineage, one.step) for one in present))
    foreign = [one.step for one in present if not is_ancestor(one.lineage, one.step, own, reached)]
    if foreign and not in_place and not checkpoint.overwrite_save:
        raise UserError(_refusal(checkpoint, foreign, origin is not None))
    return own


def of_one_run(candidates: Sequence[Path]) -> list[Path]:
    """The first of these checkpoints and those that it comes from; all of them where its own state cannot be read."""
    saved = [_saved(path, save_directory.step_of(path)) for path in candidates]
    if not saved or not saved[0].lineage:
        return list(candidates)
    first = saved[0]
    return [
        path
        for path, one in zip(candidates, saved, strict=True)
        if one is first or not one.lineage or is_ancestor(one.lineage, one.step, first.lineage, first.step)
    ]


def _saved(path: Path, step: int) -> Saved:
    """More lenient than `state_file.read_state`: a checkpoint of any release has a name and a lineage, or is left alone."""
    try:
        content = read_json(path / save_directory.STATE, nan=True)
        return Saved(step, content["name"], lineage_in(content))
    except (OSError, ValueError, KeyError, TypeError):
        return Saved(step, None, ())


def _refusal(checkpoint: CheckpointConfig, foreign: Sequence[int], resumed: bool) -> str:
    save, first, last = Path(str(checkpoint.save)), min(foreign), max(foreign)
    names = save_directory.directory_of(save, first).name + (
        "" if first == last else f" to {save_directory.directory_of(save, last).name}"
    )
    whose = f"that the one of --load {checkpoint.load} does not come from" if resumed else "of another run"
    at_start = "" if resumed else ", and this one starts at step 0"
    go_on = f"--load {save}{' without --finetune' if checkpoint.finetune else ''} goes on from them"
    return (
        f"--save {save} holds checkpoints {whose} ({len(foreign)}: {names}){at_start}: {go_on}, another --save leaves them alone, and "
        "--overwrite-save lets this run replace those whose steps it reaches"
    )
