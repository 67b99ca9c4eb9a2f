"""The libraries that know tokenizers' files: SentencePiece, Hugging Face's tokenizers (for GPT-2's files too), and none for bytes.

A Library is what one of them says about a tokenizer, and how it encodes. Without `matches_special` a text is encoded as if its special
tokens and its end of a document were not in the vocabulary: SentencePiece gets that piece as a control piece, a tokenizer.json
as a special token that is not looked for, and a model that would still spell one (unigram, whole words) gets it under another name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_salt.errors import UserError
from megatron_salt.small_files import parse_json
from megatron_salt.tokenizer.document_ends import DOCUMENT, OTHERS, TEXT, Declared, find_eod, of_template
from megatron_salt.tokenizer.sentencepiece_model import user_defined_pieces, with_control_piece

if TYPE_CHECKING:
    import tokenizers

EncodeIds = Callable[[list[str]], list[list[int]]]
GPT2_EOD = "<|endoftext|>"
BYTE_LEVEL_EOD, BYTE_LEVEL_NAME = 256, "<eod>"

_FIRST_SENTENCEPIECE = ("<eod>", "<|endoftext|>", "<EOD>")
_FIRST_HUGGING_FACE = ("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_RARE = "\U000e0fff\ue000\U0003ffff"  # no vocabulary has these


@dataclass(frozen=True, eq=False, kw_only=True)
class Library:
    """One tokenizer, as its library has it."""

    vocabulary_size: int
    """Largest id + 1."""
    special: Mapping[str, int]
    """Special tokens, the end of a document not among them where it is none."""
    unknown: Collection[int]
    """Ids that stand for what the vocabulary lacks: text gives them."""
    id_of: Callable[[str], int | None]
    text_of: Callable[[int], str | None]
    """How text could spell an id; None: no text can."""
    eod: Callable[[Declared, str], int | None]
    """(what files beside it declare, its name in messages) -> the id that ends documents. UserError where that is open."""
    first_eod: int | None
    """The id that the first versions of this tool took; datasets and checkpoints of theirs are there."""
    declared: Declared
    """What the tokenizer's own file declares."""
    encoder: Callable[[int | None, bool], tuple[EncodeIds, Callable[[], bytes] | None]]
    """(eod, matches_special) -> how texts are encoded, and the same as a tokenizer.json, if there is one."""
    decode_ids: Callable[[list[int]], str]

    def eod_alone(self) -> int | None:
        """The end of a document by the tokenizer's own file; None where that leaves it open."""
        try:
            return self.eod(Declared(), "")
        except UserError:
            return None


def open_library(kind: str, files: Mapping[str, bytes], origin: str) -> Library:
    """The library's view of a tokenizer of `kind`; UserError, by the name `origin`, for damaged files."""
    openers = {
        "SentencePieceTokenizer": _sentencepiece,
        "HuggingFaceTokenizer": _hugging_face,
        "GPT2BPETokenizer": _gpt2,
        "ByteLevelTokenizer": _byte_level,
    }
    return openers[kind](files, origin)


def _refuse_tiktoken(content: bytes, origin: str) -> None:
    """UserError for lines of a token in base64 and its rank, which Llama 3 calls tokenizer.model."""
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content[:4096]):
        raise UserError(
            f"{origin} is a tiktoken vocabulary, as Llama 3's tokenizer.model is, which lacks the rules that split text; take "
            "the tokenizer.json beside it: --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json"
        )


def _sentencepiece(files: Mapping[str, bytes], origin: str) -> Library:
    import sentencepiece

    _refuse_tiktoken(files["tokenizer.model"], origin)
    content = files["tokenizer.model"]
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise UserError(f"{origin} is not a SentencePiece model: {error}") from None

    def id_of(piece: str) -> int | None:
        found = processor.piece_to_id(piece)  # the id of <unk> for a piece it lacks
        return found if processor.id_to_piece(found) == piece else None

    def encoder(eod: int | None, matches_special: bool) -> tuple[EncodeIds, Callable[[], bytes]]:
        model, used = content, processor
        if eod is not None and not matches_special and not processor.is_control(eod):
            model = with_control_piece(content, eod)
            used = sentencepiece.SentencePieceProcessor()
            used.LoadFromSerializedProto(model)
        # One thread: whoever wants more runs several processes, and a pool of threads per call would cost more than it gives.
        return lambda texts: used.encode(texts, out_type=int, num_threads=1), lambda: _json_of_sentencepiece(model)

    size = processor.vocab_size()
    special = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
    named = {piece: found for piece in (*DOCUMENT, *TEXT) if (found := id_of(piece)) is not None}
    if named.keys() - special.keys():  # a piece of text ends no document
        named = {piece: named[piece] for piece in named.keys() & {*special, *user_defined_pieces(content)}}
    declared = Declared(
        frozenset(i for i in [processor.eos_id()] if i >= 0), frozenset(i for i in [processor.bos_id()] if i >= 0)
    )
    first = next((found for piece in _FIRST_SENTENCEPIECE if (found := id_of(piece)) is not None), None)
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


def _hugging_face(files: Mapping[str, bytes], origin: str) -> Library:
    content = files["tokenizer.json"]
    _refuse_tiktoken(files["tokenizer.json"], origin)
    try:
        model = _model_of(content, False)
    except ValueError as error:
        raise UserError(f"{origin} is not a tokenizer.json: {error}") from None
    special = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
    declared = Declared() if model.post_processor is None else of_template(json.loads(model.post_processor.__getstate__()))

    def encoder(eod: int | None, matches_special: bool) -> tuple[EncodeIds, Callable[[], bytes]]:
        if matches_special:
            return _rust_encode(_model_of(content, True)), lambda: content
        names = {**special, **({} if eod is None else {str(model.id_to_token(eod)): eod})}
        used, description = model, content
        given = _given(used, names, unknown)
        if given:
            description = _without_pieces(content, given)
            used = _model_of(description, False)
        return _rust_encode(used), lambda: description

    first = next((i for i in map(model.token_to_id, _FIRST_HUGGING_FACE) if i is not None), None)
    unknown = set(_probe(model, _RARE))
    return Library(
        vocabulary_size=max(model.get_vocab(with_added_tokens=True).values()) + 1,  # ids may have holes
        special=special,
        unknown=unknown,
        id_of=model.token_to_id,
        text_of=model.id_to_token,
        eod=lambda beside, origin: find_eod(special, (DOCUMENT, (*TEXT, *OTHERS)), (declared | beside).eos, origin),
        first_eod=first,
        declared=declared,
        encoder=encoder,
        decode_ids=lambda ids: model.decode(ids),
    )


def _model_of(content: bytes, matches_special: bool) -> tokenizers.Tokenizer:
    """ValueError where it is no tokenizer.json."""
    import tokenizers

    model = tokenizers.Tokenizer.from_buffer(content)
    model.encode_special_tokens = not matches_special
    model.no_padding()  # a tokenizer.json may carry both, and either would change documents
    model.no_truncation()
    return model


def _given(model: tokenizers.Tokenizer, names: Mapping[str, int], unknown: Collection[int]) -> dict[str, int]:
    """Those of the tokens `names` that text gives, even though special tokens in it are not looked for."""
    return {
        name: i
        for name, i in names.items()
        if name
        and i not in unknown
        and any(i in _probe(model, text) for text in (name, f"a{name}", f"{name}a", f"a {name} a", f"\n{name}\n"))
    }


def _probe(model: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of a text; none where the model has no word for what it does not know."""
    try:
        return list(model.encode(text, add_special_tokens=False).ids)
    except Exception:  # tokenizers raises nothing more special
        return []


def _without_pieces(tokenizer_json: bytes, tokens: Mapping[str, int]) -> bytes:
    """A tokenizer.json whose model spells none of `tokens` any more: each has another name there, and nothing merges to or from it."""
    content: dict[str, Any] = json.loads(tokenizer_json)
    model = content["model"]
    names = {name: f"\uffff\ufffe{i}\ufffe\uffff" for name, i in tokens.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    for token in content["added_tokens"]:
        if token["content"] in tokens:
            token["special"], token["content"] = True, names[token["content"]]
    content["post_processor"] = None
    return json.dumps(content).encode()


def _gpt2(files: Mapping[str, bytes], origin: str) -> Library:
    from tokenizers import AddedToken, pre_tokenizers

    try:
        vocabulary = {str(token): int(i) for token, i in parse_json(files["vocab.json"]).items()}
        lines = files["merges.txt"].decode("utf-8").removeprefix("\ufeff").split("\n")
        lines = [line.rstrip("\r") for line in lines[1 if lines[0].startswith("#version") else 0 :]]
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"{origin} are not GPT-2's vocabulary and merges: {error}") from None
    for left, right in pairs:
        if not {left, right, left + right} <= vocabulary.keys():
            raise UserError(f"{origin} do not belong together: the vocabulary lacks a part of the merge {left!r} {right!r}")
    missing = [symbol for symbol in pre_tokenizers.ByteLevel.alphabet() if symbol not in vocabulary]
    if missing:  # bytes without an id would vanish from the text without a word
        raise UserError(f"{origin} are not byte-level: {len(missing)} of 256 bytes have no id, such as {missing[0]!r}")
    model = _byte_level_bpe(vocabulary, pairs)
    special = {GPT2_EOD: vocabulary[GPT2_EOD]} if GPT2_EOD in vocabulary else {}

    def encoder(eod: int | None, matches_special: bool) -> tuple[EncodeIds, Callable[[], bytes]]:
        names = {**special, **({} if eod is None else {str(model.id_to_token(eod)): eod})}
        used = model
        if matches_special:
            used = _byte_level_bpe(vocabulary, pairs)
            used.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        elif given := _given(model, names, ()):
            description = _without_pieces(model.to_str().encode(), given)
            used = _model_of(description, False)
        return _rust_encode(used), lambda: used.to_str().encode()

    return Library(
        vocabulary_size=max(vocabulary.values()) + 1,
        special=special,
        unknown=(),
        id_of=vocabulary.get,
        text_of=model.id_to_token,
        eod=lambda beside, origin: vocabulary.get(GPT2_EOD),
        first_eod=vocabulary.get(GPT2_EOD),
        declared=Declared(),
        encoder=encoder,
        decode_ids=lambda ids: model.decode(ids),
    )


def _byte_level_bpe(vocabulary: dict[str, int], pairs: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    model = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return model


def _rust_encode(model: tokenizers.Tokenizer) -> EncodeIds:
    return lambda texts: [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)]


def _byte_level(files: Mapping[str, bytes], origin: str) -> Library:
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
        declared=Declared(),
        encoder=lambda eod, matches_special: (encode, None),
        decode_ids=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
    )
