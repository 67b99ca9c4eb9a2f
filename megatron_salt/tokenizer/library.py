"""What a tokenizer library says about one tokenizer, and how it encodes.

Each kind of tokenizer has a function that opens its files as a Library: SentencePiece, Hugging Face's tokenizers (for GPT-2's files
too), and plain bytes. Special tokens in a text are read as ordinary text unless the encoder is made with `matches_special`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from megatron_salt.errors import UserError
from megatron_salt.tokenizer.document_ends import DeclaredEnds

EncodeIds = Callable[[list[str]], list[list[int]]]
"""Texts -> the ids of each."""
BYTE_LEVEL_EOD, BYTE_LEVEL_NAME = 256, "<eod>"


@dataclass(frozen=True, eq=False, kw_only=True)
class Library:
    """One tokenizer, as its library describes it."""

    vocabulary_size: int
    """Largest id + 1."""
    special: Mapping[str, int]
    """Special tokens and their ids. The token that ends documents is here only if the library calls it special."""
    unknown: Collection[int]
    """Ids of text that the vocabulary has no token for: unknown, and bytes. Ordinary text gives them."""
    id_of: Callable[[str], int | None]
    """Token -> id; None: there is no such token."""
    text_of: Callable[[int], str | None]
    """Id -> the text that would spell it; None: no text can."""
    eod: Callable[[DeclaredEnds, str], int | None]
    """(ends that other files declare, name of the tokenizer in messages) -> the id that ends documents. UserError where that is open."""
    first_eod: int | None
    """The id that the first releases took, which older datasets and checkpoints hold."""
    declared: DeclaredEnds
    """Ends that the tokenizer's own file declares."""
    encoder: Callable[[int | None, bool], tuple[EncodeIds, Callable[[], bytes] | None]]
    """(eod, matches_special) -> (a function that encodes, one that gives the same tokenizer as a tokenizer.json or None)."""
    decode_ids: Callable[[list[int]], str]

    def eod_alone(self) -> int | None:
        """The id that ends documents by the tokenizer's own file; None where the file leaves it open."""
        try:
            return self.eod(DeclaredEnds(), "")
        except UserError:
            return None


def refuse_tiktoken(content: bytes, origin: str) -> None:
    """UserError for a tiktoken file: each line is a token in base64 and its rank. Llama 3 calls it tokenizer.model."""
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content[:4096]):
        raise UserError(
            f"{origin} is a tiktoken vocabulary, as Llama 3's tokenizer.model is, which lacks the rules that split text; take "
            "the tokenizer.json beside it: --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json"
        )


def open_byte_level(files: Mapping[str, bytes], origin: str) -> Library:
    """Bytes as ids, and one more id that ends documents. It has no files."""

    def encode(texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    return Library(
        vocabulary_size=BYTE_LEVEL_EOD + 1,
        special={},
        unknown=range(BYTE_LEVEL_EOD),
        id_of={BYTE_LEVEL_NAME: BYTE_LEVEL_EOD}.get,
        text_of=lambda i: None,
        eod=lambda beside, origin: BYTE_LEVEL_EOD,
        first_eod=BYTE_LEVEL_EOD,
        declared=DeclaredEnds(),
        encoder=lambda eod, matches_special: (encode, None),
        decode_ids=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
    )
