"""train_tokenizer: a lossless SentencePiece model with an end of document, the same one for the same text."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_salt.cli import run_tool
from megatron_salt.config import TokenizerConfig
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer
from megatron_salt.tools import train_tokenizer as tool
from megatron_salt.tools.train_tokenizer import TrainTokenizerConfig, choose, sentences, train_tokenizer

ROOT = Path(__file__).parents[2]
HEADS, TAILS = ("walk", "talk", "jump", "quick", "paint", "own", "garden"), ("", "s", "er", "ing", "ed", "ers")
WORDS = [head + tail for head in HEADS for tail in TAILS]
TEXTS = [" ".join(WORDS[i * k * k % 42] for k in range(1, 20)) + f".\n\n  line {i},\tthen" for i in range(200)]
ODD = [
    "",
    " ",
    "  two  spaces\t\ttabs ",
    "line\n\nbreak\r\n",
    "日本語 🎉 e\u0301 ﬁ \u00a0",
    "nul \x00",
    "</s> <eod> <unk> <0x41>",
    "2024",
]


def run(inputs: list[Path], output: Path, *flags: str) -> int:
    """The tool's exit status."""
    words = ["--input", *map(str, inputs), "--output", str(output), "--vocab-size", "320", *flags]
    return run_tool(TrainTokenizerConfig, train_tokenizer, words)


def load(output: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(output)))


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": "zebra"}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_model_is_lossless_and_ends_documents(tmp_path, corpus, model_type):
    assert run([corpus], tmp_path / "m", "--model-type", model_type) == 0
    tokenizer = load(tmp_path / "m")
    assert (tokenizer.vocabulary_size, tokenizer.eod) == (320, 1)
    for text in TEXTS[:3] + ODD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eod not in ids
    assert len(tokenizer.encode(TEXTS[1])) < len(TEXTS[1]) / 2


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_bos_is_an_id_that_no_text_gives(tmp_path, corpus, model_type):
    assert run([corpus], tmp_path / "m", "--model-type", model_type, "--bos") == 0
    tokenizer = load(tmp_path / "m")
    assert (tokenizer.vocabulary_size, tokenizer.eod, tokenizer.bos) == (320, 1, 2) and "<bos>" in tokenizer.special
    for text in (TEXTS[1], "<bos> a <bos>", " <bos><eod>"):
        ids = tokenizer.encode(text)
        assert not {1, 2} & set(ids) and tokenizer.decode(ids) == text and tokenizer.decode([2, *ids, 1]) == text
    assert run([corpus], tmp_path / "without", "--model-type", model_type) == 0 and load(tmp_path / "without").bos is None


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_file_under_any_name_and_in_any_form(tmp_path, corpus, model_type):
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    for name, path in (("a", corpus), ("b", corpus), ("c", tmp_path / "packed.jsonl.gz")):
        assert run([path], tmp_path / name, "--model-type", model_type, "--max-sentences", "500") == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_another_process_makes_the_same_file(tmp_path, corpus):
    assert run([corpus], tmp_path / "a") == 0
    flags = ["--input", str(corpus), "--output", str(tmp_path / "b"), "--vocab-size", "320"]
    subprocess.run(
        [sys.executable, "tools/train_tokenizer.py", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_plain_text_is_read_by_lines(tmp_path):
    for name, times in (("b.txt", 50), ("a.txt", 51)):
        (tmp_path / name).write_text("walking talking walking talking\n\n" * times)
    assert run([tmp_path / "*.txt"], tmp_path / "m", "--vocab-size", "275") == 0
    assert len(load(tmp_path / "m").encode("walking")) <= 2


def test_only_the_named_keys_are_read(tmp_path, corpus):
    assert run([corpus], tmp_path / "m", "--json-keys", "title", "--vocab-size", "266") == 0
    assert len(load(tmp_path / "m").encode("zebra")) < len(load(tmp_path / "m").encode("quick"))


def test_without_byte_fallback_unseen_characters_are_unknown(tmp_path, corpus):
    assert run([corpus], tmp_path / "m", "--no-byte-fallback", "--vocab-size", "100") == 0
    assert load(tmp_path / "m").encode("日")[-1] == 0


@pytest.mark.parametrize("text", [*TEXTS[:2], *ODD, "\n\n\nx", "x" * 10_000, "日" * 5000 + "\n" + "b" * 4096])
def test_sentences_join_to_the_text_and_are_short(text):
    parts = list(sentences(text))
    assert "".join(parts) == text and all(len(part) <= tool.SENTENCE_CHARACTERS for part in parts)


def test_a_choice_among_more_lines_than_the_bound_is_fixed_and_even():
    numbers = [str(i) for i in range(1000)]
    assert choose(numbers, 1000) == numbers and choose(numbers, 5000) == numbers
    chosen = choose(numbers, 200)
    assert chosen == choose(iter(numbers), 200) and len(set(chosen)) == 200 and set(chosen) <= set(numbers)
    hundreds = Counter(int(number) // 100 for number in chosen)
    assert all(8 <= hundreds[i] <= 34 for i in range(10))  # 20 expected, 3 standard deviations


def test_the_bound_is_on_lines_seen_by_training(tmp_path, corpus, capsys):
    assert run([corpus], tmp_path / "m", "--max-sentences", "150") == 0
    assert "training on 150 lines" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, flags, word",
    [
        (None, [], "no such file"),
        (b"", [], "holds no text"),
        (b"\n\n", [], "holds no text"),
        (b'{"text": ""}\n', [], "holds no text"),
        (b'{"other": "abc"}\n', [], "no key 'text'"),
        (b'{"text": "a"}\nbad\n', [], "x.jsonl:2: malformed JSON"),
        (b'{"text": "\xff"}\n', [], "x.jsonl:1: invalid UTF-8"),
        (b'{"text": "abc"}\n', ["--vocab-size", "9000"], "--vocab-size 9000"),
        (b'{"text": "abc"}\n', ["--vocab-size", "200"], "--vocab-size 200"),
        (b'{"text": "abc"}\n', ["--vocab-size", "0"], "--vocab-size"),
        (b'{"text": "abc"}\n', ["--max-sentences", "0"], "--max-sentences"),
        (b'{"text": "abc"}\n', ["--character-coverage", "98"], "--character-coverage"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name_and_leaves_nothing(tmp_path, capsys, content, flags, word):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert run([path], tmp_path / "out" / "m", *flags) == 2
    assert word in capsys.readouterr().err and not list(tmp_path.glob("out/*"))


def test_bad_lines_up_to_the_limit_are_left_out(tmp_path, corpus):
    assert run([corpus], tmp_path / "clean") == 0
    with open(corpus, "ab") as stream:
        stream.write(b'bad\n{"text": 1}\n')
    assert run([corpus], tmp_path / "m", "--max-bad-lines", "2") == 0
    assert (tmp_path / "m").read_bytes() == (tmp_path / "clean").read_bytes()


def test_a_directory_is_no_model(tmp_path, corpus, capsys):
    assert run([corpus], tmp_path, "--overwrite") == 2
    assert f"--output {tmp_path} is a directory; give the name of a file" in capsys.readouterr().err


def test_a_model_that_exists_is_kept_without_overwrite(tmp_path, corpus, capsys):
    (tmp_path / "m").write_bytes(b"old")
    assert run([corpus], tmp_path / "m") == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "m").read_bytes() == b"old"
    assert run([corpus], tmp_path / "m", "--overwrite") == 0
    assert load(tmp_path / "m").vocabulary_size == 320 and not (tmp_path / "m.tmp").exists()


def test_an_unwritable_place_is_refused_by_name(tmp_path, corpus, capsys):
    assert run([corpus], corpus / "m") == 2
    assert "--output" in capsys.readouterr().err
