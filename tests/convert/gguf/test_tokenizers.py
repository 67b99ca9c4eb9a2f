"""Tokenizers of GGUF files: the same ids as the tokenizer that the file was made of."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_salt.convert.gguf.pre_tokenizers import CUTTINGS, pre_tokenizer
from megatron_salt.convert.gguf.tokenizer_of_file import tokenizer_of_file
from megatron_salt.errors import UserError

TEXTS = [
    "The quick brown fox, 12345 times; it's THE fox.\n\n\n  def f(x):\n\treturn x**2",
    "Zwölf Boxkämpfer jagten Viktor quer über den großen Sylter Deich. Ελληνικά, русский текст",
    "日本語のテキスト、中文文本, हिन्दी पाठ, نص عربي, ภาษาไทย 🙂👩‍👩‍👧 e\u0301 ﬁ",
    "  two spaces   three\r\nend  ",
    "",
]


def byte_level(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A trained byte-level BPE that cuts text as `name`, and what a file says of it."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizer(CUTTINGS[name])
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(TEXTS * 20, trainer)
    model.add_tokens(["<think>"])
    tokens = [str(model.id_to_token(i)) for i in range(model.get_vocab_size())]
    merges = [" ".join(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    return model, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*tokens, "[PAD]"],
        "tokenizer.ggml.token_type": [3, 3, *([1] * (len(tokens) - 3)), 4, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.mark.parametrize("name", CUTTINGS)
def test_a_byte_level_tokenizer_gives_the_same_ids(name: str) -> None:
    model, metadata = byte_level(name)
    made = tokenizer_of_file(metadata, None, "x")
    assert made.vocabulary_size == model.get_vocab_size()  # a row without a token is no id
    for text in [*TEXTS, "a<think>b"]:
        if not CUTTINGS[name].nfc:
            assert made.encode(text) == model.encode(text, add_special_tokens=False).ids
        assert "\u0301" in text or made.decode(made.encode(text)) == text
    assert made.special == {"<|endoftext|>": 0, "<|im_end|>": 1}
    assert made.eod == 0  # the end of a turn is what a chat model declares
    assert tokenizer_of_file(metadata, "<|im_end|>", "x").eod == 1
    assert not {0, 1} & set(made.encode("<|endoftext|><|im_end|>"))


def test_names_of_cuttings_differ_where_they_should() -> None:
    """What sets them apart, seen in the words."""
    words = {
        name: [word for word, _ in pre_tokenizer(cut).pre_tokenize_str("x 1234 it's\n\n")] for name, cut in CUTTINGS.items()
    }
    assert words["gpt-2"] == ["x", "Ġ1234", "Ġit", "'s", "ĊĊ"]
    assert words["smollm"][1:6] == ["Ġ", "1", "2", "3", "4"]
    assert words["llama-bpe"][1:4] == ["Ġ", "123", "4"]
    assert words["qwen2"][1:6] == ["Ġ", "1", "2", "3", "4"]


@pytest.fixture(scope="module")
def sentencepieces() -> sentencepiece.SentencePieceProcessor:
    """A BPE model as Llama 2 has one: bytes for unknown characters, white space as it is."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:3] * 20), model_writer=out, vocab_size=460, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2,
        user_defined_symbols=["<think>"],
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def kind_of(model: sentencepiece.SentencePieceProcessor, i: int) -> int:
    if model.is_unknown(i):
        return 2
    if model.is_control(i):
        return 3
    if model.id_to_piece(i) == "<think>":
        return 4
    return 6 if model.is_byte(i) else 1


def test_a_sentencepiece_tokenizer_gives_the_same_ids(sentencepieces: sentencepiece.SentencePieceProcessor) -> None:
    model = sentencepieces
    size = model.vocab_size()
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [kind_of(model, i) for i in range(size)],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
    }
    made = tokenizer_of_file(metadata, None, "x")
    assert (made.vocabulary_size, made.eod, made.bos) == (size, model.eos_id(), model.bos_id())
    for text in [*TEXTS, "a <think> b", "</s>"]:
        assert made.encode(text) == model.encode(text)
        assert made.decode(made.encode(text)) == model.decode(model.encode(text))
    bare = tokenizer_of_file(metadata | {"tokenizer.ggml.add_space_prefix": False}, None, "x")
    assert bare.encode("fox") != made.encode("fox") and bare.encode(" fox") == made.encode("fox")
    trimmed = tokenizer_of_file(metadata | {"tokenizer.ggml.remove_extra_whitespaces": True}, None, "x")
    assert trimmed.encode("a  b ") == made.encode("a b")
    with pytest.raises(UserError, match="scores are all equal"):
        tokenizer_of_file(metadata | {"tokenizer.ggml.scores": [-1000.0] * size}, None, "x")
    with pytest.raises(UserError, match="no token of tokenizer.ggml.token_type is the unknown one"):
        tokenizer_of_file(metadata | {"tokenizer.ggml.token_type": [1] * size}, None, "x")
