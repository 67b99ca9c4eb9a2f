"""SentencePiece models as a Library.

A text must not give the id that ends documents. SentencePiece matches any normal or user-defined piece, but never a control piece.
So the piece that ends documents becomes a control piece, unless `matches_special` is set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from megatron_salt.errors import UserError
from megatron_salt.tokenizer.document_ends import DOCUMENT, TEXT, DeclaredEnds, find_eod
from megatron_salt.tokenizer.library import EncodeIds, Library, refuse_tiktoken
from megatron_salt.tokenizer.sentencepiece_model import user_defined_pieces, with_control_piece

_FIRST_EODS = ("<eod>", "<|endoftext|>", "<EOD>")  # in the order in which the first releases tried them


def open_sentencepiece(files: Mapping[str, bytes], origin: str) -> Library:
    """A tokenizer.model. `origin` names it in messages. UserError where it is damaged."""
    import sentencepiece

    refuse_tiktoken(files["tokenizer.model"], origin)
    content = files["tokenizer.model"]
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise UserError(f"{origin} is not a SentencePiece model: {error}") from None

    def id_of(piece: str) -> int | None:
        i = processor.piece_to_id(piece)  # the id of <unk> where there is no such piece
        return i if processor.id_to_piece(i) == piece else None

    def encoder(eod: int | None, matches_special: bool) -> tuple[EncodeIds, Callable[[], bytes]]:
        model, used = content, processor
        if eod is not None and not matches_special and not processor.is_control(eod):
            model = with_control_piece(content, eod)
            used = sentencepiece.SentencePieceProcessor()
            used.LoadFromSerializedProto(model)
        # One thread: --workers gives processes, and a pool of threads for each call costs more than it gains.
        return lambda texts: used.encode(texts, out_type=int, num_threads=1), lambda: _json_of_sentencepiece(model)

    size = processor.vocab_size()
    special = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
    named = {piece: i for piece in (*DOCUMENT, *TEXT) if (i := id_of(piece)) is not None}
    if named.keys() - special.keys():  # an ordinary piece of text ends no document
        named = {piece: named[piece] for piece in named.keys() & {*special, *user_defined_pieces(content)}}
    declared = DeclaredEnds(
        frozenset(i for i in [processor.eos_id()] if i >= 0), frozenset(i for i in [processor.bos_id()] if i >= 0)
    )
    first = next((i for piece in _FIRST_EODS if (i := id_of(piece)) is not None), None)
    return Library(
        vocabulary_size=size,
        special=special,
        unknown={processor.unk_id(), *(i for i in range(size) if processor.is_byte(i))},
        id_of=id_of,
        text_of=processor.id_to_piece,
        eod=lambda beside, origin: find_eod({**special, **named}, (DOCUMENT, TEXT), declared.eos, origin),
        first_eod=first if first is not None else next(iter(declared.eos), None),
        declared=declared,
        encoder=encoder,
        decode_ids=lambda ids: processor.decode(ids),
    )


def _json_of_sentencepiece(model: bytes) -> bytes:
    """The model as a tokenizer.json. ValueError where it has user-defined pieces."""
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    matched = user_defined_pieces(model)
    if matched:
        raise ValueError(
            f"a tokenizer.json treats the white space around user-defined pieces such as {matched[0]!r} in another way"
        )
    content = json.loads(sentencepiece_to_tokenizer_json(model))
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["special"]
    ]  # SentencePiece never matches these
    return json.dumps(content).encode()
