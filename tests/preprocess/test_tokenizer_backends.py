"""A backend is used if it gives the reference's ids; otherwise the first text with other ids is named."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_salt.errors import UserError
from megatron_salt.preprocess import tokenizer_backends
from megatron_salt.preprocess.tokenizer_backends import HARD, choose_backend, encode_with, first_difference
from megatron_salt.tokenizer.tokenizer import Tokenizer, tokenizer_from_files

TEXTS = [f"text {i}: the quick brown fox, ça et là 日本 🎉 </s> <|endoftext|>\n" * (i % 5 + 1) for i in range(60)]


def hugging_face() -> Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|endoftext|>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer_from_files("HuggingFaceTokenizer", {"tokenizer.json": model.to_str().encode()}, "test")


def sentence_piece(model_type: str = "bpe") -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=300,
        model_type=model_type,
        byte_fallback=True,
        minloglevel=2,
    )
    return tokenizer_from_files("SentencePieceTokenizer", {"tokenizer.model": model.getvalue()}, "test")


@pytest.mark.parametrize("make", [hugging_face, sentence_piece])
@pytest.mark.parametrize("backend", ["reference", "gigatoken"])
def test_backends_give_the_tokenizers_ids_end_to_end(make, backend):
    tokenizer = make()
    texts = [*TEXTS, *HARD] if backend == "reference" else TEXTS
    ids, lengths = encode_with(tokenizer, backend)(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert lengths.tolist() == list(map(len, expected)) and lengths.dtype == np.int64
    assert ids.tolist() == [each for document in expected for each in document]
    assert encode_with(tokenizer, backend)([])[0].tolist() == []


def test_gigatoken_is_taken_where_it_agrees():
    backend, why = choose_backend("auto", hugging_face(), TEXTS)
    assert backend == "gigatoken" and "60 texts of the input" in why
    assert choose_backend("reference", hugging_face(), TEXTS)[0] == "reference"
    assert choose_backend("auto", hugging_face(), [])[0] == "reference"
    assert choose_backend("gigatoken", hugging_face(), [])[0] == "gigatoken"


def test_the_first_text_that_differs_is_shown(monkeypatch):
    tokenizer = hugging_face()
    whole = tokenizer_backends._Gigatoken.__call__

    def wrong(self, texts):
        ids, lengths = whole(self, texts)
        return (ids if "fox" not in texts[0] else np.where(np.arange(len(ids)) == 12, 7, ids)), lengths

    monkeypatch.setattr(tokenizer_backends._Gigatoken, "__call__", wrong)
    backend, why = choose_backend("auto", tokenizer, ["fine", *TEXTS])
    assert backend == "reference" and "other ids" in why and "after 12 equal ones" in why
    with pytest.raises(UserError, match="--tokenizer-backend gigatoken: it gives other ids .*ça et là"):
        choose_backend("gigatoken", tokenizer, ["fine", *TEXTS])


def test_what_gigatoken_lacks_is_said(monkeypatch):
    byte_level = tokenizer_from_files("ByteLevelTokenizer", {}, "test")
    assert choose_backend("auto", byte_level, TEXTS)[0] == "reference"
    with pytest.raises(UserError, match="--tokenizer-backend gigatoken: gigatoken has nothing for a ByteLevelTokenizer"):
        choose_backend("gigatoken", byte_level, TEXTS)
    with pytest.raises(UserError, match="gigatoken cannot do this tokenizer|other ids"):
        choose_backend("gigatoken", sentence_piece("unigram"), TEXTS)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    backend, why = choose_backend("auto", hugging_face(), TEXTS)
    assert backend == "reference" and "pip install gigatoken" in why


def test_it_is_made_anew_when_it_grew_and_nothing_shows(monkeypatch):
    tokenizer = hugging_face()
    made = []
    whole = tokenizer_backends._Gigatoken._make
    monkeypatch.setattr(tokenizer_backends._Gigatoken, "_make", lambda self: (made.append(1), whole(self))[1])
    monkeypatch.setattr(tokenizer_backends, "_LOOK_EVERY", 500)
    monkeypatch.setattr(tokenizer_backends, "CACHE_BYTES", -(1 << 40))
    assert first_difference(tokenizer, encode_with(tokenizer, "gigatoken"), TEXTS) is None
    assert len(made) > 5
