"""Widely used tokenizers, which `make test-tokenizers` fetches: the backend that auto chooses gives the reference's ids."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_salt.preprocess.code_points import settled
from megatron_salt.preprocess.tokenizer_backends import HARD, choose_backend, encode_with, reference
from megatron_salt.tokenizer.tokenizer import tokenizer_from_files
from tests.preprocess.test_code_points import ODD, some_text

FETCHED = sorted((Path(__file__).parents[2] / ".tokenizers").glob("*/package/models/tokenizer.json"))
ABSENT = pytest.param(
    Path(), marks=pytest.mark.skip(reason="needs the tokenizers that make test-tokenizers fetches"), id="none"
)


@pytest.mark.long
@pytest.mark.parametrize("path", FETCHED or [ABSENT], ids=lambda path: path.parts[-4])
def test_auto_gives_the_references_ids(path: Path) -> None:
    tokenizer, chance = (
        tokenizer_from_files("HuggingFaceTokenizer", {"tokenizer.json": path.read_bytes()}, str(path)),
        random.Random(3),
    )
    backend, why = choose_backend("auto", tokenizer, ["A line of plain words, with nothing odd in it."])
    print(path.parts[-4], backend, why)
    texts = [*HARD, ODD, *("".join(some_text(chance) for _ in range(chance.randrange(1, 9))) for _ in range(1000))]
    texts += ["".join(character for character in text if settled()[ord(character)]) for text in texts]  # these are not routed
    expected, expected_lengths = reference(tokenizer)(texts)
    ids, lengths = encode_with(tokenizer, backend)(texts)
    assert lengths.tolist() == expected_lengths.tolist() and ids.tolist() == expected.tolist()
