"""Tokenizers lose nothing and add nothing, text cannot forge the end of a document, and a saved tokenizer stays the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_salt.config import TokenizerConfig
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.tokenizer import DESCRIPTION, Tokenizer, build_tokenizer, load_tokenizer

TEXT = ["the cat sat on the mat and the dog ran", "le chat dort; ça va? für Ärger 12345", "def f(x):\n\treturn x  # ."] * 30
ODD = [
    "",
    " ",
    "  two  spaces ",
    "line\n\nbreak\r\n\ttab",
    "日本語 🎉 e\u0301 ﬁ",
    "nul \x00 byte",
    "</s> <|endoftext|> <eod> <unk>",
    "x" * 5000,
]
KINDS = ["sentencepiece", "hugging_face", "gpt2", "byte_level"]


def sentencepiece_model(path: Path, **settings: Any) -> Path:
    model = io.BytesIO()
    usual: dict[str, Any] = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "vocab_size": 330,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, model_type="bpe", minloglevel=2, **{**usual, **settings}
    )
    path.write_bytes(model.getvalue())
    return path


def byte_level_bpe(special_tokens: list[str]) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special_tokens,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return model


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, TokenizerConfig]:
    """Flags for one tokenizer of each kind, whose files exist."""
    home = tmp_path_factory.mktemp("tokenizers")
    sentencepiece_model(home / "sp.model", eos_piece="</s>")
    model = byte_level_bpe(["<|endoftext|>", "<pad>"])
    model.save(str(home / "hf.json"))
    model.model.save(str(home))  # vocab.json, merges.txt: GPT-2's form
    return {
        "sentencepiece": TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(home / "sp.model")),
        "hugging_face": TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(home / "hf.json")),
        "gpt2": TokenizerConfig(
            tokenizer_type="GPT2BPETokenizer", vocab_file=str(home / "vocab.json"), merge_file=str(home / "merges.txt")
        ),
        "byte_level": TokenizerConfig(tokenizer_type="ByteLevelTokenizer"),
    }


@pytest.fixture(params=KINDS)
def config(request, configs) -> TokenizerConfig:
    return configs[request.param]


@pytest.fixture
def tokenizer(config) -> Tokenizer:
    return build_tokenizer(config)


@pytest.mark.parametrize("text", TEXT[:3] + ODD)
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXT[:1] + ODD)
def test_ids_are_in_the_vocabulary_and_text_cannot_spell_the_end_of_a_document(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocabulary_size for i in [*ids, tokenizer.eod]) and tokenizer.eod not in ids


def test_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer.encode("") == [] and tokenizer.encode(TEXT[0])[:5] == tokenizer.encode(TEXT[0] + " more")[:5]


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXT + ODD) == [tokenizer.encode(text) for text in TEXT + ODD]
    assert tokenizer.encode_batch([]) == []


def test_the_end_of_document_decodes_to_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.eod, *tokenizer.encode("a b"), tokenizer.eod]) == "a b"


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "saved")
    loaded = load_tokenizer(tmp_path / "deep" / "saved")
    for name in ("kind", "vocabulary_size", "eod", "fingerprint", "files"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode_batch(TEXT + ODD) == tokenizer.encode_batch(TEXT + ODD)


def test_vocabulary_sizes_are_those_of_the_files(configs):
    in_vocab_json = len(json.loads(Path(configs["gpt2"].vocab_file).read_text()))
    assert [build_tokenizer(configs[kind]).vocabulary_size for kind in KINDS] == [330, in_vocab_json, in_vocab_json, 257]


def test_the_vocabulary_reaches_to_the_largest_id_over_holes(tmp_path, configs):
    vocabulary = json.loads(Path(configs["gpt2"].vocab_file).read_text())
    (tmp_path / "v").write_text(json.dumps({**vocabulary, "<|endoftext|>": 999}))
    tokenizer = build_tokenizer(
        TokenizerConfig(
            tokenizer_type="GPT2BPETokenizer", vocab_file=str(tmp_path / "v"), merge_file=configs["gpt2"].merge_file
        )
    )
    assert (tokenizer.vocabulary_size, tokenizer.eod) == (1000, 999)


def test_fingerprints_depend_on_contents_and_kind_and_not_on_names(configs, tmp_path):
    prints = [build_tokenizer(configs[kind]).fingerprint for kind in KINDS]
    assert len(set(prints)) == len(prints)
    moved = tmp_path / "other.name"
    moved.write_bytes(Path(configs["sentencepiece"].tokenizer_model).read_bytes())
    assert (
        build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(moved))).fingerprint
        == prints[0]
    )
    sentencepiece_model(moved, vocab_size=331)
    assert (
        build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(moved))).fingerprint
        != prints[0]
    )


@pytest.mark.parametrize(
    "settings, piece",
    [
        ({}, "</s>"),
        ({"eos_id": -1}, None),
        ({"control_symbols": ["<eod>"]}, "<eod>"),
        ({"eos_id": 1, "bos_id": -1, "eos_piece": "<eod>"}, "<eod>"),
        ({"control_symbols": ["<|endoftext|>", "<eod>"]}, "<eod>"),
        ({"eos_id": -1, "user_defined_symbols": ["<|endoftext|>"]}, "<|endoftext|>"),
    ],
)
def test_sentencepiece_end_of_document_is_a_named_piece_or_eos_or_none(tmp_path, settings, piece):
    model = sentencepiece_model(tmp_path / "m", **settings)
    eod = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))).eod
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (None if eod is None else processor.id_to_piece(eod)) == piece


@pytest.mark.parametrize(
    "special, expected",
    [
        ([], None),
        (["</s>"], "</s>"),
        (["</s>", "<eod>", "<|endoftext|>"], "<eod>"),
        (["<s>"], None),
        (["<pad>", "<|end_of_text|>"], "<|end_of_text|>"),
    ],
)
def test_hugging_face_end_of_document_is_the_one_special_token_with_a_known_name_or_none(tmp_path, special, expected):
    model = byte_level_bpe(special)
    model.save(str(tmp_path / "t.json"))
    eod = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))).eod
    assert (None if eod is None else model.id_to_token(eod)) == expected


def test_gpt2_without_endoftext_has_no_end_of_document(tmp_path):
    byte_level_bpe([]).model.save(str(tmp_path))
    config = TokenizerConfig(
        tokenizer_type="GPT2BPETokenizer", vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt")
    )
    assert build_tokenizer(config).eod is None


def test_gpt2_files_and_tokenizer_json_of_one_model_give_the_same_ids(configs):
    ours, theirs = build_tokenizer(configs["gpt2"]), build_tokenizer(configs["hugging_face"])
    assert ours.encode_batch(TEXT + ODD) == theirs.encode_batch(TEXT + ODD)


def test_what_a_tokenizer_json_adds_cuts_or_pads_is_left_out(tmp_path, configs):
    model = tokenizers.Tokenizer.from_file(configs["hugging_face"].tokenizer_model)
    plain = build_tokenizer(configs["hugging_face"]).encode_batch(TEXT)
    model.enable_truncation(4)
    model.enable_padding(length=50)
    model.post_processor = processors.TemplateProcessing(single="<pad> $A <pad>", special_tokens=[("<pad>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    assert model.encode_batch(TEXT)[0].ids != plain[0]
    assert (
        build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))).encode_batch(
            TEXT
        )
        == plain
    )


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
@pytest.mark.parametrize("content", [None, b"", b"\x00\xffgarbage", b'{"a": 1}'])
def test_a_missing_or_damaged_file_is_named_with_its_flag(tmp_path, kind, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--tokenizer-model {path}"):
        build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(path)))


def test_a_truncated_sentencepiece_model_is_refused(tmp_path, configs):
    whole = Path(configs["sentencepiece"].tokenizer_model).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut is not a SentencePiece model"):
        build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "cut")))


@pytest.mark.parametrize(
    "vocab, merges, word",
    [
        ("[1]", "#version\na b\n", "are not GPT-2's"),
        ("{", "", "are not GPT-2's"),
        ('{"a": "x"}', "a b", "are not GPT-2's"),
        (None, "#version\na b c\n", "are not GPT-2's"),
        (None, "#version\nnever seen\n", "'never' 'seen'"),
        ('{"a": 0}', "#version\n", "255 of 256"),
    ],
)
def test_damaged_gpt2_files_are_refused_by_name(tmp_path, configs, vocab, merges, word):
    (tmp_path / "v").write_text(Path(configs["gpt2"].vocab_file).read_text() if vocab is None else vocab)
    (tmp_path / "m").write_text(merges or " ")
    with pytest.raises(UserError, match=word) as error:
        build_tokenizer(
            TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=str(tmp_path / "v"), merge_file=str(tmp_path / "m"))
        )
    assert "--vocab-file" in str(error.value) and "--merge-file" in str(error.value)


@pytest.mark.parametrize(
    "config, word",
    [
        (TokenizerConfig(), "--tokenizer-type"),
        (TokenizerConfig(tokenizer_type="SentencePieceTokenizer"), "needs --tokenizer-model"),
        (TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file="v"), "v cannot be read"),
        (TokenizerConfig(tokenizer_type="GPT2BPETokenizer", tokenizer_model="m"), "--tokenizer-model m"),
        (TokenizerConfig(tokenizer_type="ByteLevelTokenizer", tokenizer_model="m"), "takes no file"),
        (TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="m", merge_file="x"), "--merge-file x"),
    ],
)
def test_flags_of_another_kind_are_refused(config, word):
    with pytest.raises(UserError, match=word):
        build_tokenizer(config)


def test_a_saved_tokenizer_that_was_changed_is_refused(tmp_path, configs):
    build_tokenizer(configs["sentencepiece"]).save(tmp_path)
    sentencepiece_model(tmp_path / "tokenizer.model", vocab_size=340)
    with pytest.raises(UserError, match="was changed"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("damage", ["missing directory", "missing file", "no json", "kind", "names"])
def test_an_incomplete_saved_tokenizer_is_refused(tmp_path, configs, damage):
    build_tokenizer(configs["hugging_face"]).save(tmp_path)
    path = tmp_path / DESCRIPTION
    description = json.loads(path.read_text())
    match damage:
        case "missing directory":
            path.unlink()
        case "missing file":
            (tmp_path / "tokenizer.json").unlink()
        case "no json":
            path.write_text("{")
        case "kind":
            path.write_text(json.dumps({**description, "kind": "Other"}))
        case "names":
            path.write_text(json.dumps({**description, "files": ["../../etc/passwd"]}))
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_ids_beyond_the_vocabulary_are_a_bug(tokenizer):
    with pytest.raises(AssertionError):
        tokenizer.decode([tokenizer.vocabulary_size])
