"""Special tokens in a text are found and counted; with --special-tokens-in-text split no text gives their ids, in any library."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_salt.errors import UserError
from megatron_salt.preprocess.encode import Encoder, EncoderSettings
from megatron_salt.preprocess.readers import Chunk
from megatron_salt.preprocess.tokenizer_backends import choose_backend, encode_with, first_difference
from megatron_salt.tokenizer.document_ends import Ends
from megatron_salt.tokenizer.sentencepiece_model import user_defined_pieces, with_control_piece
from megatron_salt.tokenizer.special_tokens import SpecialTokenCounts, SpecialTokenFinder, counts_in_words
from megatron_salt.tokenizer.tokenizer import Tokenizer, tokenizer_from_files

TEXT = ["the cat sat on the mat and the dog ran", "le chat dort; ça va? <b>12</b>", "def f(x):\n\treturn x  # ."] * 30
PARTS = ["<eod>", "<eo", "d>", "<x>", "</s>", "<s>", " ", "  ", "\n", "the cat", "<", ">", "é", "日本", "a", "\u2581"]


def random_texts(number: int) -> list[str]:
    generator = random.Random(5)
    return ["".join(generator.choices(PARTS, k=generator.randrange(1, 12))) for _ in range(number)]


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["<eod>", "<eo", "</s>", "<x>"], ["a"], ["the cat", "the"], ["<"], ["."]])
def test_occurrences_are_those_of_a_search_at_each_place(names):
    texts = [*random_texts(300), ""]
    expected, documents = Counter[str](), 0
    for text in texts:
        at, found = 0, 0
        while at < len(text):
            name = max((name for name in names if text.startswith(name, at)), key=len, default=None)
            expected[name] += name is not None
            found += name is not None
            at += len(name) if name is not None else 1
        documents += found > 0
    found = SpecialTokenFinder(names)(texts)
    assert (found.documents, found.tokens) == (documents, {name: count for name, count in expected.items() if count})


def test_the_first_is_shown_with_what_stands_around_it():
    found = SpecialTokenFinder(["<eod>", "</s>"])(["none", "a tag <eod> in the text </s>"])
    assert found == SpecialTokenCounts(1, {"<eod>": 1, "</s>": 1}, (1, "<eod>", "'a tag <eod> in the text </s>'"))
    assert SpecialTokenFinder([])(["a"]) == SpecialTokenFinder([""])(["a"]) == SpecialTokenCounts()


def test_the_most_frequent_tokens_are_told():
    assert counts_in_words({"a": 1, "b": 3}) == "'b' 3 times, 'a' once"
    assert counts_in_words({str(i): 9 - i for i in range(8)}).endswith("and 3 other tokens")


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def sentencepiece_bytes(**settings: object) -> bytes:
    model = io.BytesIO()
    usual = {"vocab_size": 340, "model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<eod>", "<x>"]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, **{**usual, **settings}
    )
    return model.getvalue()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_user_defined_end_in_a_text_is_text_and_comes_back_as_it_was(model_type, prefix):
    content = sentencepiece_bytes(
        model_type=model_type,
        vocab_size=298,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
    )
    tokenizer = tokenizer_from_files("SentencePieceTokenizer", {"tokenizer.model": content}, "test")
    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert tokenizer.eod == library.piece_to_id("<eod>")
    for text in random_texts(300):
        ids = tokenizer.encode(text)
        assert tokenizer.eod not in ids
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")  # SentencePiece's own sign for a space
        assert (ids == library.encode(text)) == ("<eod>" not in text)


def test_a_piece_of_any_type_becomes_a_control_piece_and_the_others_stay():
    content = sentencepiece_bytes()
    before = sentencepiece.SentencePieceProcessor(model_proto=content)
    for piece in (0, 1, 3, 339):  # unknown, control, user-defined, normal
        after = sentencepiece.SentencePieceProcessor(model_proto=with_control_piece(content, piece))
        assert [after.id_to_piece(i) for i in range(340)] == [before.id_to_piece(i) for i in range(340)] or piece == 0
        assert [i for i in range(340) if after.is_control(i) != before.is_control(i)] == [piece] * (piece != 1)
        assert [i for i in range(340) if after.get_score(i) != before.get_score(i)] == []
        if piece:
            assert with_control_piece(with_control_piece(content, piece), piece) == with_control_piece(content, piece)
    assert user_defined_pieces(content) == ["<eod>", "<x>"]
    assert user_defined_pieces(with_control_piece(content, 3)) == ["<x>"]
    for piece in (-1, 340):
        with pytest.raises(ValueError, match="no piece"):
            with_control_piece(content, piece)


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def byte_level(ordinary: tuple[str, ...] = (), ignore_merges: bool = False) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    model.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=["<s>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    model.add_tokens(list(ordinary))
    return model


def unigram() -> tokenizers.Tokenizer:
    letters = sorted({*"".join(PARTS), *"".join(TEXT)} - {" "})
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("the", -1.0), ("</", -1.0), *((letter, -3.0) for letter in letters)]
    model = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(["<unk>", "</s>", "<s>"])
    return model


def of(model: tokenizers.Tokenizer, eod: str, matches_special: bool = False) -> Tokenizer:
    return tokenizer_from_files(
        "HuggingFaceTokenizer",
        {"tokenizer.json": model.to_str().encode()},
        "test",
        Ends(model.token_to_id(eod), None),
        matches_special,
    )


@pytest.mark.parametrize(
    "model, eod",
    [
        (byte_level(), "</s>"),
        (byte_level(("<eod>", "<x>")), "<eod>"),
        (byte_level(ignore_merges=True), "</s>"),
        (byte_level(), "the"),
        (unigram(), "</s>"),
    ],
    ids=["special", "ordinary added token", "whole words first", "piece", "unigram"],
)
def test_no_text_gives_a_special_id_and_texts_without_one_keep_their_ids(model, eod):
    tokenizer = of(model, eod)
    names = [re.escape(name) for name in tokenizer.special]
    model.encode_special_tokens = True
    for text in [*random_texts(300), *TEXT[:3], "</s>", "a </s> b", "<s></s>"]:
        ids = tokenizer.encode(text)
        assert not tokenizer.forbidden & set(ids)
        if "\u2581" not in text and not text.startswith(" "):
            assert tokenizer.decode(ids) == text or model.model.__class__.__name__ == "Unigram"
        if not re.search("|".join(names), text):
            assert ids == model.encode(text, add_special_tokens=False).ids


def test_unigram_texts_come_back_with_their_special_tokens():
    tokenizer = of(unigram(), "</s>")
    for text in ["a</s>a", "</s>", "the <s>cat</s> sat"]:
        assert tokenizer.decode(tokenizer.encode(text)).removeprefix(" ") == text


def test_a_piece_that_ends_documents_is_spelt_by_others():
    tokenizer = of(byte_level(), "the")
    assert tokenizer.decode(tokenizer.encode("the cat, other")) == "the cat, other" and tokenizer.eod not in tokenizer.encode(
        "the"
    )


def test_words_that_are_special_are_unknown_words():
    model = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<unk>", "</s>"])
    assert of(model, "</s>").encode("a </s> b a") == [2, 0, 0, 2]
    assert of(model, "</s>", True).encode("a </s> b a") == [2, 1, 0, 2]


# --- encode, and the other library ------------------------------------------------------------------------------------


def test_encode_is_what_the_libraries_make_of_it(tmp_path):
    content = sentencepiece_bytes()
    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = tokenizer_from_files("SentencePieceTokenizer", {"tokenizer.model": content}, "test", matches_special=True)
    assert ours.encode_batch(random_texts(50)) == library.encode(random_texts(50))
    model = byte_level()
    assert (
        of(model, "</s>", True).encode("a</s>b") == model.encode("a</s>b", add_special_tokens=False).ids
        and model.token_to_id("</s>") in model.encode("a</s>b").ids
    )
    gpt2 = tokenizers.Tokenizer(models.BPE())
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    gpt2.model.save(str(tmp_path))
    files = {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    split, encode = (
        tokenizer_from_files("GPT2BPETokenizer", files, "test", matches_special=matches) for matches in (False, True)
    )
    text = "the cat<|endoftext|> the"
    assert (
        encode.encode(text) == gpt2.encode(text).ids
        and split.eod not in split.encode(text)
        and split.decode(split.encode(text)) == text
    )


@pytest.mark.parametrize("matches_special", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda matches: tokenizer_from_files(
            "SentencePieceTokenizer",
            {"tokenizer.model": sentencepiece_bytes(user_defined_symbols=[] if matches else ["<eod>"])},
            "test",
            None,
            matches,
        ),
        lambda matches: of(byte_level(), "</s>", matches),
        lambda matches: of(byte_level(("<eod>",)), "<eod>", matches),
    ],
    ids=["sentencepiece", "special", "ordinary added token"],
)
def test_gigatoken_gives_the_same_ids_for_special_tokens_in_text(make, matches_special):
    tokenizer = make(matches_special)
    texts = [text for text in random_texts(100) if "\u2581" not in text]
    assert first_difference(tokenizer, encode_with(tokenizer, "gigatoken"), texts) is None


def test_gigatoken_is_not_taken_for_a_model_that_matches_pieces_of_its_own():
    """gigatoken gives other ids for the white space around such pieces."""
    tokenizer = tokenizer_from_files("SentencePieceTokenizer", {"tokenizer.model": sentencepiece_bytes()}, "test")
    backend, why = choose_backend("auto", tokenizer, TEXT)
    assert backend == "reference" and "'<x>'" in why


def test_a_library_that_gives_a_special_id_all_the_same_is_refused_with_the_text():
    tokenizer = tokenizer_from_files("SentencePieceTokenizer", {"tokenizer.model": sentencepiece_bytes()}, "test")
    forging = replace(tokenizer, encode_ids=lambda texts: [[5, tokenizer.eod] if "odd" in text else [5] for text in texts])
    chunk = Chunk(file=0, path="x.txt", form="text", start=0, end=20, on_disk=20, data=b"plain\nodd one\nplain\n")
    with pytest.raises(UserError, match=r"--special-tokens-in-text split: for 'odd one' .* gives '<eod>' \(id 3\)"):
        Encoder(forging, EncoderSettings(backend="reference", keys=("text",), append_eod=True)).encode(chunk)
    allowed = replace(forging, forbidden=frozenset())
    encoded = Encoder(allowed, EncoderSettings(backend="reference", keys=("text",), append_eod=False)).encode(chunk)
    assert encoded.ids[0].tolist() == [5, 5, 3, 5]
