"""The tokenizer that a GGUF file holds, as one of ours.

The kind `gpt2` is a byte-level BPE: it becomes a tokenizer.json. The kind `llama` is a SentencePiece BPE: it becomes the tokenizer.model
that it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_salt.convert.gguf.pre_tokenizers import CUTTINGS, pre_tokenizer
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.document_ends import ConfigEnds
from megatron_salt.tokenizer.sentencepiece_model import Piece, model_of_pieces
from megatron_salt.tokenizer.tokenizer import Tokenizer, tokenizer_of_contents

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_ADVICE = "give the model's own tokenizer with --tokenizer-type and --tokenizer-model"


def tokenizer_of_file(metadata: Mapping[str, Any], eod_token: str | None, where: str) -> Tokenizer:
    """The tokenizer of a file. eod_token: of the flag. Raises UserError where the file has none, or one that is not known."""
    kind = metadata.get("tokenizer.ggml.model")
    ends = ConfigEnds(_ids(metadata, "eos"), _ids(metadata, "bos"))
    if kind == "gpt2":
        contents = {"tokenizer.json": _byte_level(metadata, where)}
        return tokenizer_of_contents("HuggingFaceTokenizer", contents, eod_token, ends, where)
    if kind == "llama":
        contents = {"tokenizer.model": _sentencepiece(metadata, where)}
        return tokenizer_of_contents("SentencePieceTokenizer", contents, eod_token, ends, where)
    if kind is None:
        raise UserError(f"{where} holds no tokenizer; {_ADVICE}")
    raise UserError(f"{where}: tokenizer.ggml.model is {kind!r}; known are gpt2 and llama; {_ADVICE}")


def _ids(metadata: Mapping[str, Any], which: str) -> tuple[int, ...]:
    value = metadata.get(f"tokenizer.ggml.{which}_token_id")
    return (value,) if type(value) is int else ()


def _list(metadata: Mapping[str, Any], name: str, kind: type, where: str, length: int | None = None) -> Sequence[Any]:
    """An array of the metadata. Raises UserError where it is missing, of another kind or length."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values) or length not in (None, len(values)):
        wanted = f"{length} values" if length is not None else "a list"
        raise UserError(f"{where}: tokenizer.ggml.{name} is not {wanted} of type {kind.__name__}; {_ADVICE}")
    return values


def _byte_level(metadata: Mapping[str, Any], where: str) -> bytes:
    """The tokenizer.json of a byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    name = metadata.get("tokenizer.ggml.pre")
    cutting = CUTTINGS.get(str(name))
    if cutting is None:
        raise UserError(f"{where}: tokenizer.ggml.pre is {name!r}; known are {', '.join(CUTTINGS)}; {_ADVICE}")
    if metadata.get("tokenizer.ggml.add_space_prefix", False):
        raise UserError(f"{where}: tokenizer.ggml.add_space_prefix is True for a byte-level tokenizer; {_ADVICE}")
    tokens = _list(metadata, "tokens", str, where)
    types = _list(metadata, "token_type", int, where, len(tokens))
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str, where)]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    broken = [merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys()]
    if broken:
        raise UserError(f"{where}: tokenizer.ggml.merges has {' '.join(broken[0])!r}, which its tokens do not hold; {_ADVICE}")
    model = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cutting.ignore_merges))
    model.normalizer = normalizers.NFC() if cutting.nfc else None
    model.pre_tokenizer = pre_tokenizer(cutting)
    model.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in added if kind == _CONTROL])
    model.add_tokens([AddedToken(token, special=False, normalized=False) for token, kind in added if kind == _USER_DEFINED])
    return model.to_str().encode()


def _sentencepiece(metadata: Mapping[str, Any], where: str) -> bytes:
    """The tokenizer.model of a SentencePiece BPE."""
    tokens = _list(metadata, "tokens", str, where)
    scores = _list(metadata, "scores", float, where, len(tokens))
    types = _list(metadata, "token_type", int, where, len(tokens))
    normal = {score for score, kind in zip(scores, types, strict=True) if kind == _NORMAL}
    if len(normal) < 2:
        raise UserError(f"{where}: tokenizer.ggml.scores are all equal, so they order no merges; {_ADVICE}")
    ids = {which: next(iter(_ids(metadata, which)), None) for which in ("unknown", "bos", "eos")}
    if ids["unknown"] is None:
        ids["unknown"] = next((i for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    if ids["unknown"] is None:
        raise UserError(f"{where}: no token of tokenizer.ggml.token_type is the unknown one; {_ADVICE}")
    return model_of_pieces(
        [Piece(token, score, kind) for token, score, kind in zip(tokens, scores, types, strict=True)],
        unknown=ids["unknown"],
        bos=ids["bos"],
        eos=ids["eos"],
        add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        remove_extra_whitespaces=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
    )
