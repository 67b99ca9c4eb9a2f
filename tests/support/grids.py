"""Grids of cases for pytest.mark.parametrize: all of them in `make test-full`, otherwise enough to meet every pair of values.

@pytest.mark.parametrize("tp, pp, dp", grid(tp=(1, 2), pp=(1, 2), dp=(1, 2), where=lambda tp, pp, dp: tp * pp * dp <= 4))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def grid(where: Callable[..., bool] = lambda **_: True, **axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes' values that `where` allows; those that `pairwise` leaves out are marked `full`."""
    cases = [case for case in itertools.product(*axes.values()) if where(**dict(zip(axes, case, strict=True)))]
    chosen = set(pairwise(cases))
    return [pytest.param(*case, marks=() if number in chosen else pytest.mark.full) for number, case in enumerate(cases)]


def pairwise(cases: Sequence[Sequence[Any]]) -> list[int]:
    """Numbers of cases that together hold every pair of values (of two axes) that any case holds. Greedy and repeatable."""
    pairs = [set(itertools.combinations(enumerate(map(repr, case)), 2)) for case in cases]
    chosen, missing = [], set().union(*pairs) if cases else set()
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))  # the first of equals
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
