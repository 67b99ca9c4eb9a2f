"""Hugging Face's tokenizers as a Library: a tokenizer.json, or GPT-2's vocab.json and merges.txt.

A text must not give the id of a special token, unless `matches_special` is set. So the library does not look for special tokens in a
text. Some models (unigram, whole words) would still spell one from its characters: there the token gets another name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from megatron_salt.errors import UserError
from megatron_salt.small_files import parse_json
from megatron_salt.tokenizer.document_ends import DOCUMENT, OTHERS, TEXT, DeclaredEnds, ends_of_post_processor, find_eod
from megatron_salt.tokenizer.library import EncodeIds, Library, refuse_tiktoken

if TYPE_CHECKING:
    import tokenizers

GPT2_EOD = "<|endoftext|>"

_FIRST_EODS = (
    "<eod>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
)  # in the order in which the first releases tried them
_RARE = "\U000e0fff\ue000\U0003ffff"  # characters that no vocabulary has


def open_tokenizer_json(files: Mapping[str, bytes], origin: str) -> Library:
    """A tokenizer.json. `origin` names it in messages. UserError where it is damaged."""
    content = files["tokenizer.json"]
    refuse_tiktoken(files["tokenizer.json"], origin)
    try:
        model = _model_of(content, False)
    except ValueError as error:
        raise UserError(f"{origin} is not a tokenizer.json: {error}") from None
    special = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
    declared = (
        DeclaredEnds()
        if model.post_processor is None
        else ends_of_post_processor(json.loads(model.post_processor.__getstate__()))
    )

    def encoder(eod: int | None, matches_special: bool) -> tuple[EncodeIds, Callable[[], bytes]]:
        if matches_special:
            return _rust_encode(_model_of(content, True)), lambda: content
        names = {**special, **({} if eod is None else {str(model.id_to_token(eod)): eod})}
        used, description = model, content
        spelled = _spelled(used, names, unknown)
        if spelled:
            description = _without_pieces(content, spelled)
            used = _model_of(description, False)
        return _rust_encode(used), lambda: description

    first = next((i for i in map(model.token_to_id, _FIRST_EODS) if i is not None), None)
    unknown = set(_ids_of(model, _RARE))
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
    """The model of a tokenizer.json. ValueError where `content` is none."""
    import tokenizers

    model = tokenizers.Tokenizer.from_buffer(content)
    model.encode_special_tokens = not matches_special
    model.no_padding()  # a tokenizer.json may ask for padding and truncation, which would change documents
    model.no_truncation()
    return model


def _spelled(model: tokenizers.Tokenizer, names: Mapping[str, int], unknown: Collection[int]) -> dict[str, int]:
    """The tokens of `names` that the model spells from the characters of a text, although it does not look for special tokens."""
    return {
        name: i
        for name, i in names.items()
        if name
        and i not in unknown
        and any(i in _ids_of(model, text) for text in (name, f"a{name}", f"{name}a", f"a {name} a", f"\n{name}\n"))
    }


def _ids_of(model: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of a text; none where the model lacks an unknown token and needs it."""
    try:
        return list(model.encode(text, add_special_tokens=False).ids)
    except Exception:  # tokenizers raises plain Exception
        return []


def _without_pieces(tokenizer_json: bytes, tokens: Mapping[str, int]) -> bytes:
    """The tokenizer.json changed so that its model spells none of `tokens`: each gets another name, and its merges are removed."""
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


def open_gpt2(files: Mapping[str, bytes], origin: str) -> Library:
    """GPT-2's vocabulary and merges. `origin` names the files in messages. UserError where they are damaged."""
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
    if missing:  # the library would drop bytes without an id silently
        raise UserError(f"{origin} are not byte-level: {len(missing)} of 256 bytes have no id, such as {missing[0]!r}")
    model = _byte_level_bpe(vocabulary, pairs)
    special = {GPT2_EOD: vocabulary[GPT2_EOD]} if GPT2_EOD in vocabulary else {}

    def encoder(eod: int | None, matches_special: bool) -> tuple[EncodeIds, Callable[[], bytes]]:
        names = {**special, **({} if eod is None else {str(model.id_to_token(eod)): eod})}
        used = model
        if matches_special:
            used = _byte_level_bpe(vocabulary, pairs)
            used.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        elif spelled := _spelled(model, names, ()):
            description = _without_pieces(model.to_str().encode(), spelled)
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
        declared=DeclaredEnds(),
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
