"""What each id of a tokenizer stands for: the bytes of a text, or a role such as the end of a document.

Files of different kinds spell the same bytes in different ways. Byte-level files have one character for each byte, SentencePiece writes a
space as U+2581 and a single byte as <0xNN>. Added and special tokens stand for themselves. So two tokenizers can be compared id by id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from megatron_salt.tokenizer.library import BYTE_LEVEL_EOD, BYTE_LEVEL_NAME
from megatron_salt.tokenizer.sentencepiece_model import user_defined_pieces
from megatron_salt.tokenizer.tokenizer import Tokenizer

Kind = Literal["text", "added", "control"]
"""text: a piece of a text. added: a token that is matched in a text as a whole. control: a token that ordinary text does not give."""
Role = Literal["end of document", "beginning of text", "unknown", "padding"]

_USUAL_NAMES: Mapping[Role, tuple[str, ...]] = {
    "unknown": ("<unk>", "[UNK]", "<|unk|>"),
    "padding": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD>"),
}
"""For files that do not declare the role."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's space


@dataclass(frozen=True)
class Meaning:
    """What one id stands for."""

    content: bytes
    """The bytes of the text; of a control token its name."""
    kind: Kind
    role: Role | None = None

    @property
    def text(self) -> bytes:
        """The bytes that the id adds to a text: none for the end of a document and the other roles."""
        return b"" if self.role is not None else self.content

    def __str__(self) -> str:
        name = ascii(self.content)[1:] if len(self.content) <= 40 else f"{ascii(self.content[:40])[1:]}..."
        kind = {"text": "", "added": "added token ", "control": "special token "}[self.kind]
        return f"{kind}{name}" + (f" ({self.role})" if self.role else "")


def same_meaning(one: Meaning, other: Meaning) -> bool:
    """Whether an id stands for the same in two models. Equal roles are the same whatever their names. A piece of a text is not the
    control token of the same name."""
    if one.role is not None and one.role == other.role:
        return True
    return one.content == other.content and {one.kind, other.kind} != {"text", "control"}


def different_meanings(theirs: Tokenizer, ours: Tokenizer, count: int) -> list[tuple[int, str, str]]:
    """(id, what it is to `theirs`, what it is to `ours`) for each of the first `count` ids that mean something else, or nothing, there.

    An id without a meaning here is alike. Pure.
    """
    meanings = zip(meanings_of_ids(theirs)[:count], meanings_of_ids(ours)[:count], strict=True)
    return [
        (i, str(there or "nothing"), str(here))
        for i, (there, here) in enumerate(meanings)
        if here is not None and (there is None or not same_meaning(there, here))
    ]


def meanings_of_ids(tokenizer: Tokenizer) -> list[Meaning | None]:
    """What each id in [0, vocabulary_size) stands for; None: the vocabulary has no token of this id."""
    meanings, roles = _READERS[tokenizer.kind](tokenizer)
    found: list[Meaning | None] = [meanings.get(i) for i in range(tokenizer.vocabulary_size)]
    by_role: dict[int | None, Role] = {i: role for role, i in reversed(list(_all_roles(tokenizer, roles)))}
    for i, role in by_role.items():
        if i is not None and (meaning := found[i]) is not None:
            found[i] = Meaning(meaning.content, "control", role)
    return found


def bytes_of_ids(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id adds to a text: none for the end of a document and the other roles, and for ids without a token."""
    return [b"" if meaning is None else meaning.text for meaning in meanings_of_ids(tokenizer)]


Roles = Mapping[Role, int | None]
_Reader = Callable[[Tokenizer], tuple[dict[int, Meaning], Roles]]
"""A tokenizer -> its ids' meanings, without roles; and the roles that its file declares."""


def _all_roles(tokenizer: Tokenizer, declared: Roles) -> Iterator[tuple[Role, int | None]]:
    """(role, id), the role that counts most first: an id may have several."""
    yield "end of document", tokenizer.eod
    yield "beginning of text", tokenizer.bos
    for role, names in _USUAL_NAMES.items():
        named = next((tokenizer.special[name] for name in names if name in tokenizer.special), None)
        yield role, named if declared.get(role) is None else declared[role]


# ---- by kind of tokenizer ----------------------------------------------------------------------------------------------


def _of_bytes(tokenizer: Tokenizer) -> tuple[dict[int, Meaning], Roles]:
    meanings = {i: Meaning(bytes([i]), "text") for i in range(BYTE_LEVEL_EOD)}
    return meanings | {BYTE_LEVEL_EOD: Meaning(BYTE_LEVEL_NAME.encode(), "control")}, {}


def _of_gpt2(tokenizer: Tokenizer) -> tuple[dict[int, Meaning], Roles]:
    vocabulary = json.loads(tokenizer.files["vocab.json"])
    special = set(tokenizer.special.values())
    return {
        i: Meaning(piece.encode(), "control") if i in special else Meaning(_byte_level(piece), "text")
        for piece, i in vocabulary.items()
    }, {}


def _of_sentencepiece(tokenizer: Tokenizer) -> tuple[dict[int, Meaning], Roles]:
    import sentencepiece

    model = tokenizer.files["tokenizer.model"]
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    added, meanings = set(user_defined_pieces(model)), {}
    for i in range(processor.vocab_size()):
        piece: str = processor.id_to_piece(i)
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            meanings[i] = Meaning(piece.encode(), "control")
        elif processor.is_byte(i):
            meanings[i] = Meaning(_single_byte(piece) or piece.encode(), "text")
        else:
            meanings[i] = Meaning(piece.replace(_SPACE, " ").encode(), "added" if piece in added else "text")
    return meanings, {"unknown": _real(processor.unk_id()), "padding": _real(processor.pad_id())}


def _real(i: int) -> int | None:
    return i if i >= 0 else None


def _of_tokenizer_json(tokenizer: Tokenizer) -> tuple[dict[int, Meaning], Roles]:
    import tokenizers

    content = tokenizer.files["tokenizer.json"]
    library = tokenizers.Tokenizer.from_buffer(content)
    description: dict[str, Any] = json.loads(content)
    spell = _spelling(description)
    meanings = {i: Meaning(spell(piece), "text") for piece, i in library.get_vocab(with_added_tokens=False).items()}
    for i, token in library.get_added_tokens_decoder().items():
        name: str = token.content
        if token.special:
            meanings[i] = Meaning(name.encode(), "control")
        else:  # a file made from a SentencePiece model writes the spaces of added tokens as that model does
            meanings[i] = Meaning((name.replace(_SPACE, " ") if _has_spaces(description) else name).encode(), "added")
    model, padding = description["model"], description.get("padding") or {}
    unknown = model.get("unk_id")
    if unknown is None and isinstance(model.get("unk_token"), str):
        unknown = library.token_to_id(model["unk_token"])
    return meanings, {"unknown": unknown, "padding": padding.get("pad_id")}


def _spelling(description: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How the pieces of a tokenizer.json are spelled: a function from a piece to its bytes."""
    if any(part.get("type") == "ByteLevel" for part in _parts(description)):
        return _byte_level
    spaces, single = _has_spaces(description), bool(description["model"].get("byte_fallback"))

    def spell(piece: str) -> bytes:
        byte = _single_byte(piece) if single else None
        if byte is not None:
            return byte
        return (piece.replace(_SPACE, " ") if spaces else piece).encode("utf-8", errors="replace")

    return spell


def _has_spaces(description: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json writes spaces as SentencePiece does: by a Metaspace, or by parts that replace one by the other."""
    return any(
        part.get("type") == "Metaspace"
        or (part.get("type") == "Replace" and _SPACE in (part.get("content"), (part.get("pattern") or {}).get("String")))
        for part in _parts(description)
    )


def _parts(description: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Normalizers, pre-tokenizers and decoders, those inside a Sequence too."""
    waiting = [description.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            for name in ("normalizers", "pretokenizers", "decoders"):
                waiting += part.get(name) or []


def _single_byte(piece: str) -> bytes | None:
    match = _BYTE.fullmatch(piece)
    return None if match is None else bytes([int(match[1], 16)])


def _byte_level(piece: str) -> bytes:
    """The bytes of a byte-level piece. A piece with other characters, which no text gives, stands for itself."""
    of_character = _byte_level_alphabet()
    if all(character in of_character for character in piece):
        return bytes(of_character[character] for character in piece)
    return piece.encode("utf-8", errors="replace")


@cache
def _byte_level_alphabet() -> Mapping[str, int]:
    """Character -> byte. Printable characters of Latin-1 stand for their own byte; the other bytes, in order, for those from U+0100 on.
    Source: GPT-2's encoder, `bytes_to_unicode`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_READERS: Mapping[str, _Reader] = {
    "ByteLevelTokenizer": _of_bytes,
    "GPT2BPETokenizer": _of_gpt2,
    "SentencePieceTokenizer": _of_sentencepiece,
    "HuggingFaceTokenizer": _of_tokenizer_json,
}
