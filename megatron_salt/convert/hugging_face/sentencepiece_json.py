"""A SentencePiece model as a tokenizer.json, by the settings in its file: table of characters, white space, pieces and their scores.

SentencePiece merges over the whole text and never across a user-defined piece. So nothing splits a text before its pieces are found, but
at user-defined pieces. Whether both give the same ids is for the caller to try: tokenizer_files.py does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"  # what SentencePiece writes for a space
_BPE, _UNIGRAM = 2, 1  # TrainerSpec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # SentencePiece.type


def json_of_sentencepiece(content: bytes) -> bytes:
    """The tokenizer.json of a tokenizer.model. ValueError for a model of words or of characters."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    built = Tokenizer(_model_of(proto))
    built.normalizer = normalizers.Sequence(list(_normalizers(proto.normalizer_spec)))
    matched = sorted((piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED), key=len, reverse=True)
    if matched:
        pattern = "|".join(map(_literal, matched))
        built.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    built.decoder = _decoder(proto)
    special = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    built.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return built.to_str().encode()


def _model_of(proto: Any) -> tokenizers.models.Model:
    """The pieces, and how a text is cut into them."""
    from tokenizers import models

    spec, pieces = proto.trainer_spec, proto.pieces
    if spec.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != _BPE:
        raise ValueError("it is a SentencePiece model of words or of characters")
    ranks = {piece.piece: (-piece.score, number) for number, piece in enumerate(pieces) if piece.type == _NORMAL}
    merges = [  # a pair merges as early as the score of the piece that it makes says
        (rank, len(left), left, whole[len(left) :])
        for whole, rank in ranks.items()
        for left in (whole[:end] for end in range(1, len(whole)))
        if left in ranks and whole[len(left) :] in ranks
    ]
    return models.BPE(
        {piece.piece: number for number, piece in enumerate(pieces)},
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=any(piece.type == _USER_DEFINED for piece in pieces),
    )


def _normalizers(spec: Any) -> list[tokenizers.normalizers.Normalizer]:
    """What SentencePiece does with a text first, in its order."""
    from tokenizers import Regex, normalizers

    steps: list[tokenizers.normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex("  +"), " ")]
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return steps


def _decoder(proto: Any) -> tokenizers.decoders.Decoder:
    from tokenizers import Regex, decoders

    unknown = rf"\A{_literal(proto.pieces[proto.trainer_spec.unk_id].piece)}\z"  # each token is tried alone
    steps: list[tokenizers.decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.Replace(Regex(unknown), proto.trainer_spec.unk_surface),
    ]
    steps += [decoders.ByteFallback()] if proto.trainer_spec.byte_fallback else []
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _literal(text: str) -> str:
    """A pattern that matches this text alone."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)
