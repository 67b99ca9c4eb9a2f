"""An id stands for the same bytes whatever kind of file its tokenizer has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from megatron_salt.config import TokenizerConfig
from megatron_salt.tokenizer.id_bytes import Meaning, bytes_of_ids, meanings_of_ids, same_meaning
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer
from tests.tokenizer.test_tokenizer import TEXT, byte_level_bpe, sentencepiece_model

ODD = ["  two  spaces ", "日本語 🎉 e\u0301 ﬁ", "a\u00a0b\u00ad\x7f\x00", "line\n\nbreak\r\n\ttab"]


def from_json(path: Path, content: Any) -> Tokenizer:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    home = tmp_path_factory.mktemp("tokenizers")
    model = byte_level_bpe(["<|endoftext|>", "<pad>"])
    model.model.save(str(home))
    sentencepiece_model(home / "sp.model", eos_piece="</s>", vocab_size=360)
    pieces = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(home / "sp.model")))
    assert pieces.as_json is not None
    converted = json.loads(pieces.as_json())
    converted["added_tokens"] += [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, name in enumerate(("<unk>", "<s>", "</s>"))
    ]
    model.add_tokens([AddedToken("<tool>", special=False), AddedToken("  ", special=False)])
    return {
        "bytes": build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer")),
        "hugging_face": from_json(home / "hf.json", model.to_str()),
        "gpt2": build_tokenizer(
            TokenizerConfig(
                tokenizer_type="GPT2BPETokenizer", vocab_file=str(home / "vocab.json"), merge_file=str(home / "merges.txt")
            )
        ),
        "sentencepiece": pieces,
        "converted": from_json(home / "converted.json", converted),
    }


@pytest.mark.parametrize("kind", ["bytes", "hugging_face", "gpt2", "sentencepiece", "converted"])
def test_the_bytes_of_ids_join_to_the_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    table = bytes_of_ids(tokenizers[kind])
    assert len(table) == tokenizers[kind].vocabulary_size
    for text in [*TEXT[:3], *ODD]:
        joined = b"".join(table[i] for i in tokenizers[kind].encode(text))
        dummy = kind in ("sentencepiece", "converted")  # a space before the text
        assert joined == (b" " if dummy else b"") + text.encode()


def test_ends_unknown_and_padding_add_nothing_to_a_text(tokenizers: dict[str, Tokenizer]) -> None:
    for kind, tokenizer in tokenizers.items():
        assert tokenizer.eod is not None and bytes_of_ids(tokenizer)[tokenizer.eod] == b"", kind
    meanings = meanings_of_ids(tokenizers["sentencepiece"])
    assert [meaning and meaning.role for meaning in meanings[:3]] == ["unknown", "beginning of text", "end of document"]
    assert meanings_of_ids(tokenizers["hugging_face"])[1] == Meaning(b"<pad>", "control", "padding")


def test_added_tokens_stand_for_themselves(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["hugging_face"]
    meanings = meanings_of_ids(tokenizer)
    tool, spaces = tokenizer.id_of("<tool>"), tokenizer.id_of("  ")
    assert tool is not None and meanings[tool] == Meaning(b"<tool>", "added")
    assert spaces is not None and meanings[spaces] == Meaning(b"  ", "added")


@pytest.mark.parametrize("one, other", [("sentencepiece", "converted"), ("gpt2", "hugging_face")])
def test_the_same_vocabulary_in_another_format_means_the_same(tokenizers: dict[str, Tokenizer], one: str, other: str) -> None:
    ours, theirs = meanings_of_ids(tokenizers[one]), meanings_of_ids(tokenizers[other])
    assert len(ours) <= len(theirs)
    for i, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        assert mine is not None and yours is not None
        if (one, i) != ("gpt2", 1):  # <pad> is an ordinary piece in GPT-2's files
            assert same_meaning(mine, yours), (i, str(mine), str(yours))


def test_every_byte_has_an_id(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert {bytes([byte]) for byte in range(256)} <= set(bytes_of_ids(tokenizer))


def test_an_id_without_a_token_means_nothing(tmp_path: Path) -> None:
    content = json.loads(byte_level_bpe(["<|endoftext|>"]).to_str())
    content["model"]["vocab"]["far away"] = 400
    meanings = meanings_of_ids(from_json(tmp_path / "tokenizer.json", content))
    assert len(meanings) == 401 and meanings[399] is None and meanings[400] is not None


@pytest.mark.parametrize(
    "one, other, same",
    [
        (Meaning(b"a", "text"), Meaning(b"a", "text"), True),
        (Meaning(b"a", "text"), Meaning(b"b", "text"), False),
        (Meaning(b"  ", "text"), Meaning(b"  ", "added"), True),
        (Meaning(b"<tool>", "added"), Meaning(b"<tool>", "control"), True),
        (Meaning(b"</s>", "text"), Meaning(b"</s>", "control", "end of document"), False),
        (Meaning(b"<eod>", "control", "end of document"), Meaning(b"</s>", "control", "end of document"), True),
        (Meaning(b"<s>", "control", "beginning of text"), Meaning(b"</s>", "control", "end of document"), False),
        # a chat model declares another end, but both have the token
        (Meaning(b"</s>", "control", "end of document"), Meaning(b"</s>", "control"), True),
    ],
)
def test_roles_compare_with_roles_and_bytes_with_bytes(one: Meaning, other: Meaning, same: bool) -> None:
    assert same_meaning(one, other) is same and same_meaning(other, one) is same


def test_a_meaning_is_short_in_words() -> None:
    assert str(Meaning(b" the\xff", "text")) == "' the\\xff'"
    assert str(Meaning(b"</s>", "control", "end of document")) == "special token '</s>' (end of document)"
    assert len(str(Meaning(b"x" * 500, "added"))) < 70
