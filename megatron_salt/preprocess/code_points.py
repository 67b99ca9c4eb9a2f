"""Which code points every encoder treats alike, and which texts hold other ones.

Two libraries may split the same text differently: they know letters, digits and marks from tables of different Unicode versions.
A code point is settled if the Unicode version of this Python, which is older than theirs, has it, and if its normal form is settled:
it was in Unicode 3.2, or it is neither a mark nor decomposed. tests/preprocess/test_code_points.py tries each one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

_NEWEST = 15  # oldest Unicode version of the encoders that are compared; a newer Python cannot tell what they know
_PLANES = (
    range(0xD800),
    range(0xE000, 0x40000),
    range(0xE0000, 0xE0200),
)  # all others are unassigned, private or surrogates
LATIN_END, HAN, HAN_END = 0x250, 0x4E00, 0x9FA6
"""All code points below LATIN_END and from HAN to HAN_END are settled, so most texts need no look into the table."""


@cache
def settled() -> np.ndarray:
    """Whether each code point is settled: bool [0x110000]."""
    old = unicodedata.ucd_3_2_0
    new = unicodedata if int(unicodedata.unidata_version.split(".")[0]) <= _NEWEST else old
    is_settled = np.zeros(0x110000, bool)
    for plane in _PLANES:
        for code in plane:
            character = chr(code)
            category = new.category(character)
            if category != "Cn":
                is_settled[code] = old.category(character) != "Cn" or (category[0] != "M" and not new.decomposition(character))
    return is_settled


def unsettled_texts(texts: Sequence[str]) -> list[int]:
    """The numbers of the texts that hold a code point that is not settled."""
    others = [number for number, text in enumerate(texts) if not text.isascii()]
    if _all_settled("".join([texts[number] for number in others])):
        return []
    return [number for number in others if not _all_settled(texts[number])]


def _all_settled(text: str) -> bool:
    codes = np.array([text]).view(np.uint32)  # twice as fast as text.encode
    rare = np.flatnonzero((codes >= LATIN_END) & (codes - np.uint32(HAN) >= HAN_END - HAN))
    return bool(settled().take(codes[rare]).all())
