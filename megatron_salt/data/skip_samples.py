"""The ranges of --skip-samples. Pure: mistakes are found before torch is imported."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from megatron_salt.errors import UserError

SkipRanges = tuple[tuple[int, int], ...]

_MOST = 2**62  # positions are int64


def parse_skip_samples(values: Sequence[str]) -> SkipRanges:
    """`A:B` strings -> ((A, B), ...) in ascending order; UserError naming --skip-samples."""
    ranges = []
    for value in values:
        start, colon, end = value.partition(":")
        numbers = colon and all(part.isascii() and part.isdigit() and len(part) < 20 for part in (start, end))
        if not (numbers and int(start) < int(end)):
            raise UserError(f"--skip-samples takes A:B with whole numbers 0 <= A < B, such as 51200:56320, got {value}")
        ranges.append((int(start), int(end)))
    if sum(end for _, end in ranges) > _MOST:
        raise UserError(f"--skip-samples {' '.join(values)} jumps over more samples than can be counted, {_MOST}")
    ranges.sort()
    for one, other in itertools.pairwise(ranges):
        if one[0] == other[0]:
            raise UserError(f"--skip-samples {one[0]}:{one[1]} and {other[0]}:{other[1]} start at the same sample; give one")
    return tuple(ranges)
