"""Context and continuation are encoded as one text and split as lm-evaluation-harness splits them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tokenizers

from megatron_salt.config import TokenizerConfig
from megatron_salt.errors import UserError
from megatron_salt.evaluation.requests import encode, first_id
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer, tokenizer_from_files

BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
LETTERS = ["<eod>", "<bos>", "Ġ", "a", "b", "c", "Ġa", "ab", "Ġab", "Ċ"]


def merging(bos: bool = False) -> Tokenizer:
    """A byte-level BPE that joins a space with the letters after it, and `a` with `b`; its file puts <bos> before a text, or not."""
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(LETTERS)}, [("a", "b"), ("Ġ", "ab"), ("Ġ", "a")])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(["<eod>", "<bos>"])
    if bos:
        model.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer_from_files("HuggingFaceTokenizer", {"tokenizer.json": model.to_str().encode()}, "test")


def ask(context: str, continuation: str, tokenizer: Tokenizer | None = None, bos: int | None = None, longest: int = 100):
    [request] = encode([(context, continuation)], merging() if tokenizer is None else tokenizer, bos, longest, ["here"])
    tokens = [LETTERS[one] for one in request.ids] if tokenizer is None else request.ids.tolist()
    return tokens, request.num_scored


def test_white_space_at_the_end_of_the_context_moves_to_the_continuation():
    expected = (["c", "Ġab"], 1)
    assert ask("c ", "ab") == ask("c", " ab") == expected
    assert ask("c\n ", "ab") == (["c", "Ċ", "Ġab"], 2)


def test_both_are_encoded_as_one_text():
    assert ask("ca", "bb") == (["c", "ab", "b"], 1)  # alone the context has two tokens: c, a


def test_an_empty_context_is_the_end_of_a_document_or_bos():
    assert ask("", "ab") == (["<eod>", "ab"], 1)
    assert ask("", "ab", bos=1) == (["<bos>", "ab"], 1)
    assert ask("  ", "ab") == (["<eod>", "Ġ", "Ġab"], 2)
    with pytest.raises(UserError, match="here: the context is empty, and the ByteLevelTokenizer has no end-of-document id"):
        ask("", "ab", replace(BYTES, eod=None))


def test_bos_comes_before_the_context():
    assert ask("c", " ab", bos=1) == (["<bos>", "c", "Ġab"], 1)


def test_a_context_that_is_too_long_loses_its_beginning():
    [request] = encode([("0123456789", "ab")], BYTES, None, 4, ["here"])
    assert bytes(request.ids.tolist()) == b"789ab"  # four inputs and the last label
    assert (request.num_scored, request.num_cut) == (2, 7)
    [whole] = encode([("789", "ab")], BYTES, None, 4, ["here"])
    assert whole.num_cut == 0
    with pytest.raises(UserError, match="here: the continuation has 5 tokens, the model takes 4"):
        encode([("0", "12345")], BYTES, None, 4, ["here"])


def test_a_continuation_that_the_tokenizer_joins_with_the_context_is_refused():
    with pytest.raises(UserError, match="here: 'b' has no tokens of its own: the tokenizer joins it with the context"):
        ask("a", "b")


def test_auto_takes_bos_where_the_tokenizers_own_file_does():
    assert first_id(merging(bos=True), "auto") == 1
    assert first_id(merging(bos=False), "auto") is None
    assert first_id(merging(bos=True), "no") is None
    assert first_id(BYTES, "auto") is None
    assert first_id(replace(BYTES, bos=7), "yes") == 7
    with pytest.raises(UserError, match="--add-bos yes: the ByteLevelTokenizer declares no beginning-of-sequence token"):
        first_id(BYTES, "yes")


def test_many_texts_keep_their_order():
    pairs = [("x" * (number % 7 + 1), str(number)) for number in range(9000)]
    found = encode(pairs, BYTES, None, 100, [json.dumps(pair) for pair in pairs])
    assert [bytes(one.ids[-one.num_scored :].tolist()).decode() for one in found] == [continuation for _, continuation in pairs]
