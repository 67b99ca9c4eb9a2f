"""Which checkpoints a run comes from: `lineage` in state.json. Pure, standard library only.

A fresh start has a random id, and whoever resumes goes on under it. A start that would continue a checkpoint a second time branches off
with an id of its own: after a rewind, or into another --save. So `[["a", 0], ["b", 10]]` in the checkpoint of step 30 says: a up to step
10, then b. Steps of a that lie after 10 are an abandoned branch. Neither clocks nor names of directories count.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

Lineage = tuple[tuple[str, int], ...]
"""(id, last step before its first), oldest first. Empty: nobody's, as in a state.json that says nonsense."""

UNNAMED: Lineage = (("", 0),)
"""Of every checkpoint that was written before there were lineages."""


def fresh() -> Lineage:
    """Of a run that starts at step 0."""
    return ((uuid.uuid4().hex, 0),)


def lineage_in(facts: Any) -> Lineage:
    """What a checkpoint's state.json says."""
    try:
        entries = facts.get("lineage", UNNAMED)
        lineage = tuple((name, since) for name, since in entries)
    except (AttributeError, TypeError, ValueError):
        return ()
    steps = [since for _, since in lineage]
    good = (
        all(isinstance(name, str) and type(since) is int for name, since in lineage)
        and steps[:1] == [0]
        and steps == sorted(steps)
    )
    return lineage if good else ()


def is_ancestor(there: Lineage, step: int, mine: Lineage, at: int) -> bool:
    """Whether a checkpoint of `step` is one that the run came by on its way to step `at`, or that very one."""
    if not there or there != mine[: len(there)]:
        return False
    return step <= (mine[len(there)][1] if len(there) < len(mine) else at)


def resumed(found: Lineage, step: int, in_place: bool, others: Iterable[tuple[Lineage, int]]) -> Lineage:
    """Of a run that goes on from a checkpoint. in_place: --save is where it lies, and `others` are what else lies there, with their steps.

    Unnamed checkpoints count as the run's own only where it resumed from one of them in place.
    """
    if in_place and found not in ((), UNNAMED) and not any(_goes_on(found, step, *other) for other in others):
        return found
    if not in_place:
        found = tuple(entry for entry in found if entry[0])
        found = (*((name, 0) for name, _ in found[:1]), *found[1:])
    return (*found, (uuid.uuid4().hex, step if found else 0))


def _goes_on(found: Lineage, step: int, there: Lineage, at: int) -> bool:
    """Whether `there` continued the same branch beyond `step`."""
    return there[: len(found)] == found and (there[len(found)][1] if len(there) > len(found) else at) > step
