"""Special tokens that occur in texts as characters: found, counted, reported.

These tokens are special: those that a tokenizer.json marks so; the control pieces and the unknown piece of a SentencePiece model; the
end-of-document token of any tokenizer. Other added tokens and user-defined pieces are ordinary vocabulary. Pure.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_salt.errors import UserError

Policy = Literal["encode", "split", "refuse"]
"""Values of --special-tokens-in-text."""
_AROUND = 30  # characters of an excerpt on each side


@dataclass(frozen=True)
class SpecialTokenCounts:
    """Special tokens in some texts."""

    documents: int = 0
    """Number of texts with a special token."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Token -> occurrences."""
    first: tuple[int, str, str] | None = None
    """First special token: (number of the text from 0, token, text around it). None: there is none."""


class SpecialTokenFinder:
    """Texts -> SpecialTokenCounts, for the special tokens `names`. Cheap for texts without any."""

    def __init__(self, names: Iterable[str]) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        # The longest names come first: tokenizers match them so.
        for name in sorted(filter(None, names), key=lambda name: (-len(name), name)):
            groups[name[:2]].append(name)
        self._prefixes = tuple(groups)
        self._names = re.compile(
            "|".join(
                re.escape(prefix) + "(?:" + "|".join(re.escape(name[2:]) for name in group) + ")"
                for prefix, group in groups.items()
            )
        )

    def __call__(self, texts: Sequence[str]) -> SpecialTokenCounts:
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
        return SpecialTokenCounts(documents, dict(tokens), first)


def excerpt(text: str, start: int, end: int) -> str:
    """text[start:end] and the characters around it, in quotes."""
    return repr(text[max(start - _AROUND, 0) : end + _AROUND])


def counts_in_words(tokens: Mapping[str, int], at_most: int = 5) -> str:
    """Token counts in words, the most frequent first."""
    ranked = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))
    words = ", ".join(f"{token!r} {count} times" if count > 1 else f"{token!r} once" for token, count in ranked[:at_most])
    return words + (f" and {len(ranked) - at_most} other tokens" if len(ranked) > at_most else "")


def describe_sample(counts: SpecialTokenCounts, texts: int, policy: Policy) -> str:
    """Line for the start of preprocessing: special tokens in a sample of the input."""
    what = {
        "encode": "they are encoded as the tokenizer's own library does",
        "split": "they are encoded as ordinary text",
        "refuse": "the first such document ends the run",
    }[policy]
    if not counts.documents:
        return f"special tokens in text: none in a sample of {texts} texts; where there are some, {what}"
    return f"special tokens in text: {counts.documents} of {texts} texts of a sample, {counts_in_words(counts.tokens)}; {what}"


def describe_dataset(documents: int, tokens: Mapping[str, int], policy: str) -> str:
    """End of the line about a finished dataset; empty where no document has a special token."""
    return f"; special tokens in the text of {documents} documents ({policy}): {counts_in_words(tokens)}" if documents else ""


def refuse_special(counts: SpecialTokenCounts, before: int, path: str, key: str) -> None:
    """UserError, with document and token, where the texts of a chunk have a special token.

    before: number of documents of the same file in earlier chunks. path, key: of the file, for the message.
    """
    if counts.first is not None:
        number, token, around = counts.first
        raise UserError(
            f"--special-tokens-in-text refuse: document {before + number + 1} of {path} (bad lines not counted) has {token!r} "
            f"under {key!r}: {around}; split encodes it as ordinary text"
        )
