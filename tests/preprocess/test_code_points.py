"""Encoders of different Unicode versions agree on settled code points; a text with other ones goes to the reference."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_salt.preprocess.code_points import HAN, HAN_END, LATIN_END, settled, unsettled_texts
from megatron_salt.preprocess.tokenizer_backends import encode_with, first_difference, reference
from megatron_salt.tokenizer.tokenizer import Tokenizer, tokenizer_from_files

ODD = "x \U0001fae9| \u1ad9 end"  # a face of Unicode 16 and a mark of Unicode 17
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    (
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
        "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
)
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
FAMILIES = {
    "gpt2": ((), None),
    "llama3": (LLAMA3, None),
    "qwen": (LLAMA3, "NFC"),
    "deepseek": (DEEPSEEK, None),
    "o200k": (O200K, None),
}
"""(splitting patterns, normalizer) of widely used tokenizers."""


def pre_tokenizer(patterns: tuple[str, ...]) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not patterns}
    splits = [{"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False} for each in patterns]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]} if patterns else byte_level


def tokenizer_of(family: str, vocabulary: dict[str, int], merges: list[list[str]]) -> Tokenizer:
    patterns, normalizer = FAMILIES[family]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        "model": model,
        "normalizer": normalizer and {"type": normalizer},
        "pre_tokenizer": pre_tokenizer(patterns),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    return tokenizer_from_files("HuggingFaceTokenizer", {"tokenizer.json": json.dumps(content).encode()}, "test")


def of_all_pairs(family: str) -> Tokenizer:
    """A model with a merge for any two bytes, in random order: its ids show where a text was split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [list(pair) for pair in itertools.product(alphabet, alphabet)]
    random.Random(0).shuffle(pairs)
    words = [*alphabet, *map("".join, pairs)]
    return tokenizer_of(family, {word: number for number, word in enumerate(words)}, pairs)


def trained(family: str) -> Tokenizer:
    """A model trained on code points of all planes, unsettled ones included."""
    chance = random.Random(1)
    texts = [some_text(chance) for _ in range(300)] + [ODD] * 9
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    content = json.loads(model.to_str())["model"]
    return tokenizer_of(family, content["vocab"], content["merges"])


def some_text(chance: random.Random) -> str:
    """Random texts: letters, signs, white space, and code points of any plane, assigned or not."""
    near = "aZ é'\u0301\n\r\t 1२\u00a0_-.,|/日本ёم한\u200d\ufe0f🎉"
    far = (
        lambda: chr(chance.randrange(0x250)),
        lambda: chr(chance.randrange(0xD800)),
        lambda: chr(chance.randrange(0x10000, 0x33500)),
        lambda: chr(chance.randrange(0xE000, 0x110000)),
        lambda: ODD,
    )
    return "".join(chance.choice(far)() if chance.random() < 0.2 else chance.choice(near) for _ in range(chance.randrange(60)))


def test_what_spares_the_table_is_settled():
    assert settled()[:LATIN_END].all() and settled()[HAN:HAN_END].all() and settled()[[0x3002, 0xFF0C, 0x1F600, 0xAC00]].all()
    assert not settled()[[0x1FAE9, 0x1AD9, 0x378, 0x10FFFF, 0xD800]].any()


def test_texts_with_an_unsettled_code_point_are_found_one_by_one():
    texts = ["plain", "", "é", "日本", ODD, "a\x00", "\u0378", "🎉", "日本\x00", "\ufffe"]
    assert unsettled_texts(texts) == [4, 6, 9]
    assert unsettled_texts(texts[:4]) == unsettled_texts([]) == []
    assert all(unsettled_texts([text]) == ([0] if number in (4, 6, 9) else []) for number, text in enumerate(texts))


@pytest.mark.long
@pytest.mark.parametrize(
    "family",
    [pytest.param("gpt2", marks=pytest.mark.full), pytest.param("llama3", marks=pytest.mark.full), "qwen", "deepseek", "o200k"],
)
def test_encoders_agree_on_every_settled_code_point(family):
    """Oracle: the reference. Texts are not routed here, because the routing relies on this law."""
    pytest.importorskip("gigatoken")
    tokenizer = of_all_pairs(family)
    fast, slow = encode_with(tokenizer, "gigatoken"), reference(tokenizer)
    codes = np.flatnonzero(settled()).tolist()
    for start in range(0, len(codes), 4096):
        text = "".join(f"x{chr(code)}y {chr(code)}1\n" for code in codes[start : start + 4096])
        if fast([text])[0].tolist() != slow([text])[0].tolist():
            assert (
                first_difference(tokenizer, fast, [f"x{chr(code)}y {chr(code)}1\n" for code in codes[start : start + 4096]])
                is None
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_references_whatever_the_text(family):
    pytest.importorskip("gigatoken")
    tokenizer, chance = trained(family), random.Random(2)
    texts = [ODD, *(some_text(chance) for _ in range(2000))]
    ids, lengths = encode_with(tokenizer, "gigatoken")(texts)
    expected, expected_lengths = reference(tokenizer)(texts)
    assert lengths.tolist() == expected_lengths.tolist() and ids.tolist() == expected.tolist()
