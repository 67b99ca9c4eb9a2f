"""A reduced grid has each pair of values of the whole grid, and is much smaller."""

from __future__ import annotations

import itertools

from tests.support.grids import grid, pairwise


def pairs_of(cases: list[tuple]) -> set:
    return {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}


def test_a_subset_meets_every_pair_that_is_allowed():
    whole = [case for case in itertools.product((1, 2, 4), (1, 2), ("a", "b"), (True, False)) if case[0] * case[1] <= 4]
    subset = [whole[number] for number in pairwise(whole)]
    assert pairs_of(subset) == pairs_of(whole)
    assert len(subset) <= 8 < len(whole) == 20


def test_what_the_subset_leaves_out_is_marked_full_and_what_is_not_allowed_is_gone():
    cases = grid(lambda tp, pp, dp: tp * pp * dp <= 4, tp=(1, 2), pp=(1, 2), dp=(1, 2))
    assert [case.values for case in cases] == [case for case in itertools.product((1, 2), repeat=3) if case != (2, 2, 2)]
    assert {case.values for case in cases if not case.marks} == {(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert all(mark.name == "full" for case in cases for mark in case.marks)
