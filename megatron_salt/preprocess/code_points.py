"""Which code points every encoder classifies alike, and which texts hold others.

Two libraries split text by letters, digits and marks as the Unicode version in their tables says, and newer versions know more characters.
A code point is settled where the Unicode of this Python, older than theirs, has it, and where normalising it is settled too: it
was in Unicode 3.2, or it is neither a mark nor decomposed. tests/preprocess/test_code_points.py tries each one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

_NEWEST = 15  # Unicode of the oldest table in an encoder that is compared; a Python that knows more is no measure
_PLANES = (
    range(0xD800),
    range(0xE000, 0x40000),
    range(0xE0000, 0xE0200),
)  # the others have no character, or private ones alone
LATIN_END, HAN, HAN_END = 0x250, 0x4E00, 0x9FA6
"""All code points below LATIN_END and from HAN to HAN_END are settled, which spares most texts the table."""


@cache
def settled() -> np.ndarray:
    """Whether a code point is settled: bool [0x110000]."""
    old = unicodedata.ucd_3_2_0
    new = unicodedata if int(unicodedata.unidata_version.split(".")[0]) <= _NEWEST else old
    found = np.zeros(0x110000, bool)
    for plane in _PLANES:
        for code in plane:
            character = chr(code)
            category = new.category(character)
            if category != "Cn":
                found[code] = old.category(character) != "Cn" or (category[0] != "M" and not new.decomposition(character))
    return found


def unsettled_texts(texts: Sequence[str]) -> list[int]:
    """The numbers of the texts that hold a code point that is not settled."""
    others = [number for number, text in enumerate(texts) if not text.isascii()]
    if _all_settled("".join([texts[number] for number in others])):
        return []
    return [number for number in others if not _all_settled(texts[number])]


def _all_settled(text: str) -> bool:
    codes = np.array([text]).view(np.uint32)  # half the time of an encoding
    rare = np.flatnonzero((codes >= LATIN_END) & (codes - np.uint32(HAN) >= HAN_END - HAN))
    return bool(settled().take(codes[rare]).all())
