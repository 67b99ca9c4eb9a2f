"""A tokenizer of ours as the files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_salt.convert.hugging_face.sentencepiece_json import json_of_sentencepiece
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.sentencepiece_model import user_defined_pieces, with_control_piece
from megatron_salt.tokenizer.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer, checkpoint: Path, context: int, prepend_bos: bool) -> Mapping[str, bytes]:
    """{name: contents} of a tokenizer's files. checkpoint: for messages. context: longest text, in tokens.

    The end of a document is the end of a text. No token is added before a text, or with `prepend_bos` the one that begins documents.
    Raises UserError for a tokenizer that has no such files, or that has no such token.
    """
    if tokenizer.as_json is None:
        raise UserError(f"{checkpoint}: the {tokenizer.kind} has no form that transformers reads; --no-tokenizer leaves it out")
    names = {i: name for name, i in tokenizer.special.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "add_bos_token": prepend_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eod is not None and tokenizer.eod in names:
        config["eos_token"] = names[tokenizer.eod]
    begin = bos_of_export(tokenizer, checkpoint) if prepend_bos else None
    if begin is not None:
        config["bos_token"] = names[begin]
    content = _as_json(tokenizer, checkpoint)
    _refuse_other_ids(tokenizer, content, checkpoint)
    return {
        "tokenizer.json": _with_added_tokens(content, {} if begin is None else {names[begin]: begin}),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


_SAMPLE = (
    "The quick brown fox, 3.14159 and 1234567890: doesn't it?",
    "  two spaces, a\ttab\r\n\n\n lines  ",
    "Größe, café, Œuvre, ﬁ ½ e\u0301; Съешь ещё булок; καλημέρα",
    "東京都 こんにちは 你好 한국어 नमस्ते สวัสดี مرحبا שלום",
    "🙂👩\u200d👧 \u200b\ufeff\u00a0\u3000x\u2028y",
    "def f(x):\n    return x**2  # {}[]<>|\\",
    "",
    " ",
)  # fmt: skip
"""Texts on which a written tokenizer must agree with ours."""


_QWEN2_SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer splits a text."""


def read_as_another(files: Mapping[str, bytes], architecture: str) -> bool:
    """Whether AutoTokenizer of transformers 5 would read a tokenizer by other rules than its file's.

    It gives every model of type qwen2 the rules of Qwen2's own tokenizer, whatever tokenizer.json says.
    """
    if architecture != "Qwen2ForCausalLM" or "tokenizer.json" not in files:
        return False
    tree = json.loads(files["tokenizer.json"])
    return tree["normalizer"] != {"type": "NFC"} or json.dumps(_QWEN2_SPLITS) not in json.dumps(tree["pre_tokenizer"])


def _as_json(tokenizer: Tokenizer, checkpoint: Path) -> bytes:
    """The tokenizer.json. Raises UserError for a kind of SentencePiece model that has none."""
    assert tokenizer.as_json is not None
    if tokenizer.kind != "SentencePieceTokenizer":
        return tokenizer.as_json()
    model = tokenizer.files["tokenizer.model"]
    try:
        return json_of_sentencepiece(model if tokenizer.eod is None else with_control_piece(model, tokenizer.eod))
    except ValueError as error:
        raise UserError(
            f"{checkpoint}: the {tokenizer.kind} has no form that transformers reads: {error}; --no-tokenizer"
        ) from None


def _refuse_other_ids(tokenizer: Tokenizer, content: bytes, checkpoint: Path) -> None:
    """Raise UserError where a tokenizer.json gives other ids than the tokenizer on one of `_SAMPLE`, or beside a user-defined piece."""
    import tokenizers

    written = tokenizers.Tokenizer.from_buffer(content)
    pieces = user_defined_pieces(tokenizer.files["tokenizer.model"]) if tokenizer.kind == "SentencePieceTokenizer" else []
    texts = [*_SAMPLE, *(f"a{piece}b  {piece} c{piece}" for piece in pieces if piece not in tokenizer.special)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        theirs = written.encode(text, add_special_tokens=False).ids
        if theirs != ids:
            raise UserError(
                f"{checkpoint}: as a tokenizer.json the {tokenizer.kind} would encode {text!r} as {theirs[:8]}..., and training has "
                f"{ids[:8]}...; --no-tokenizer leaves it out"
            )


def bos_of_export(tokenizer: Tokenizer, checkpoint: Path) -> int:
    """The id that --prepend-bos puts before a text. Raises UserError where the tokenizer has none."""
    if tokenizer.bos is None or tokenizer.bos not in tokenizer.special.values():
        raise UserError(
            f"--prepend-bos: the {tokenizer.kind} in {checkpoint} declares no beginning-of-sequence token, or several"
        )
    return tokenizer.bos


def _with_added_tokens(content: bytes, begin: Mapping[str, int]) -> bytes:
    """tokenizer.json that puts `begin`, at most one token and its id, before a text, and nothing else before or after it."""
    tree = json.loads(content)
    tree["padding"] = tree["truncation"] = tree["post_processor"] = None
    for token, i in begin.items():
        first = {"SpecialToken": {"id": token, "type_id": 0}}
        texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
        tree["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, texts[0]],
            "pair": [first, texts[0], first, texts[1]],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
        }
    return json.dumps(tree, ensure_ascii=False).encode()
