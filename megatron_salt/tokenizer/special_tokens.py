"""Special tokens that stand in texts as characters: found, counted, and told.

Special are the tokens that a tokenizer.json marks as special, a SentencePiece model's control pieces and its unknown piece, and in any
tokenizer the end-of-document token. Other added tokens and user-defined pieces are vocabulary like any other. Pure.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_salt.errors import UserError

Policy = Literal["encode", "split", "refuse"]
"""--special-tokens-in-text."""
_AROUND = 30  # characters of an excerpt on each side


@dataclass(frozen=True)
class Found:
    """What some texts hold of special tokens."""

    documents: int = 0
    """Texts with any."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Token -> occurrences."""
    first: tuple[int, str, str] | None = None
    """Of the first: the text's number from 0, the token, and what stands around it. None: there is none."""


class Finder:
    """Texts -> Found, for the special tokens `names`. Costs little where there are none."""

    def __init__(self, names: Iterable[str]) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(filter(None, names), key=lambda name: (-len(name), name)):  # the longest first, as tokenizers match
            groups[name[:2]].append(name)
        self._prefixes = tuple(groups)
        self._names = re.compile(
            "|".join(
                re.escape(prefix) + "(?:" + "|".join(re.escape(name[2:]) for name in group) + ")"
                for prefix, group in groups.items()
            )
        )

    def __call__(self, texts: Sequence[str]) -> Found:
        documents, tokens, first = 0, Counter[str](), None
        for number, text in enumerate(texts):
            if not any(prefix in text for prefix in self._prefixes):
                continue
            matches = list(self._names.finditer(text))
            if not matches:
                continue
            documents += 1
            tokens.update(match.group() for match in matches)
            if first is None:
                first = number, matches[0].group(), excerpt(text, matches[0].start(), matches[0].end())
        return Found(documents, dict(tokens), first)


def excerpt(text: str, start: int, end: int) -> str:
    """What stands around text[start:end], in quotes."""
    return repr(text[max(start - _AROUND, 0) : end + _AROUND])


def told(tokens: Mapping[str, int], at_most: int = 5) -> str:
    """Occurrences in words, the most frequent first."""
    ranked = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))
    words = ", ".join(f"{token!r} {count} times" if count > 1 else f"{token!r} once" for token, count in ranked[:at_most])
    return words + (f" and {len(ranked) - at_most} other tokens" if len(ranked) > at_most else "")


def told_of_sample(found: Found, texts: int, policy: Policy) -> str:
    """A line for the start of a run, on a sample of its input."""
    what = {
        "encode": "they are encoded as the tokenizer's own library does",
        "split": "they are encoded as ordinary text",
        "refuse": "the first such document ends the run",
    }[policy]
    if not found.documents:
        return f"special tokens in text: none in a sample of {texts} texts; where there are some, {what}"
    return f"special tokens in text: {found.documents} of {texts} texts of a sample, {told(found.tokens)}; {what}"


def told_at_end(documents: int, tokens: Mapping[str, int], policy: str) -> str:
    """The end of a line on a dataset; nothing where no document has any."""
    return f"; special tokens in the text of {documents} documents ({policy}): {told(tokens)}" if documents else ""


def refuse_special(found: Found, before: int, path: str, key: str) -> None:
    """UserError, with document and token, where a chunk's texts hold any. before: documents of that file in earlier chunks."""
    if found.first is not None:
        number, token, around = found.first
        raise UserError(
            f"--special-tokens-in-text refuse: document {before + number + 1} of {path} (bad lines not counted) has {token!r} "
            f"under {key!r}: {around}; split encodes it as ordinary text"
        )
