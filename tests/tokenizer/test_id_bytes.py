"""The bytes of ids, joined, are the text, for every kind of tokenizer; ends of documents are no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_salt.config import TokenizerConfig
from megatron_salt.tokenizer.id_bytes import byte_counts, byte_level, id_bytes
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer
from tests.tokenizer.test_tokenizer import ODD, TEXT, byte_level_bpe, sentencepiece_model

KINDS = ["sentencepiece", "byte level", "gpt2", "metaspace", "bytes"]


def metaspace_bpe() -> tokenizers.Tokenizer:
    """As of a Llama 2: spaces are U+2581, a character without a token is written in bytes."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.normalizer = normalizers.Replace(" ", "\u2581")
    model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    model.train_from_iterator(TEXT, trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], vocab_size=100, show_progress=False))
    content = json.loads(model.to_str())
    size = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {f"<0x{byte:02X}>": size + byte for byte in range(256)}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def made(home: Path, kind: str) -> Tokenizer:
    if kind == "bytes":
        return build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    if kind == "sentencepiece":
        file = sentencepiece_model(home / "sp.model", eos_piece="</s>", add_dummy_prefix=False)
        return build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(file)))
    model = metaspace_bpe() if kind == "metaspace" else byte_level_bpe(["<|endoftext|>", "<pad>"])
    if kind == "gpt2":
        model.model.save(str(home))
        files = dict(vocab_file=str(home / "vocab.json"), merge_file=str(home / "merges.txt"))
        return build_tokenizer(TokenizerConfig(tokenizer_type="GPT2BPETokenizer", **files))
    model.add_tokens([AddedToken("<löse>", normalized=False)])
    model.save(str(home / f"{kind}.json"))
    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(home / f"{kind}.json")))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_ids_joined_are_the_text(home: Path, kind: str) -> None:
    """So the byte totals of one text are equal for any two tokenizers."""
    tokenizer = made(home, kind)
    table, counts = id_bytes(tokenizer), byte_counts(tokenizer)
    for text in [*TEXT[:3], *ODD, "a <löse> b"]:
        ids = tokenizer.encode(text)
        assert b"".join(table[i] for i in ids) == text.encode()
        assert counts[[*ids, tokenizer.eod]].sum() == len(text.encode())
    assert counts[tokenizer.eod] == 0 and table[tokenizer.eod] != b"" and len(table) == tokenizer.vocabulary_size


def test_a_space_that_a_tokenizer_puts_before_a_text_is_one_byte(home: Path) -> None:
    file = sentencepiece_model(home / "prefix.model", eos_piece="</s>")
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(file)))
    assert byte_counts(tokenizer)[tokenizer.encode("the cat")].sum() == len(" the cat")


def test_byte_level_characters_are_those_of_the_library() -> None:
    """Each byte once, and each by the character that tokenizers' own pre-tokenizer writes for it."""
    assert sorted(byte_level(char)[0] for char in pre_tokenizers.ByteLevel.alphabet()) == [*range(256)]
    text = "".join(map(chr, range(0x250)))
    written = "".join(
        part for part, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )
    assert byte_level(written) == text.encode()
