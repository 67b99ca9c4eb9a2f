"""Grids of cases for pytest.mark.parametrize. `make test-full` runs all cases; otherwise a few cover every pair of values.

@pytest.mark.parametrize("tp, pp, dp", grid(tp=(1, 2), pp=(1, 2), dp=(1, 2), where=lambda tp, pp, dp: tp * pp * dp <= 4))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def grid(where: Callable[..., bool] = lambda **_: True, **axes: Sequence[Any]) -> list[Any]:
    """All combinations of the axes' values that `where` allows. Cases that `pairwise` leaves out are marked `full`."""
    cases = [case for case in itertools.product(*axes.values()) if where(**dict(zip(axes, case, strict=True)))]
    chosen = set(pairwise(cases))
    return [pytest.param(*case, marks=() if number in chosen else pytest.mark.full) for number, case in enumerate(cases)]


def pairwise(cases: Sequence[Sequence[Any]]) -> list[int]:
    """Indices of cases that together have each pair of values (of two axes) that any case has. Greedy and deterministic."""
    pairs = [set(itertools.combinations(enumerate(map(repr, case)), 2)) for case in cases]
    chosen, missing = [], set().union(*pairs) if cases else set()
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))  # the first of equals
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
