"""Fixtures for preprocess_data (input and output) and for score_data (datasets, a teacher, its score indices)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_salt.selection.score_reader import ScoreIndex
from tests.support.datasets import TEXTS, write_lines
from tests.support.program import SEQ_LENGTH, train, write_tokens
from tests.support.scoring import NUM_SAMPLES, score


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def out(tmp_path) -> Path:
    """An output directory. It holds only what the tool leaves."""
    return tmp_path / "out"


@pytest.fixture(scope="module")
def sentencepiece_flags(tmp_path_factory) -> list[str]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    path = tmp_path_factory.mktemp("model") / "sp.model"
    path.write_bytes(model.getvalue())
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(path)]


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return write_tokens(folder / "words"), write_tokens(folder / "more", windows=9, seed=1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, datasets: tuple[str, str]) -> Path:
    save = tmp_path_factory.mktemp("teacher")
    train(data_path=datasets[0], untie_embeddings_and_output_weights=True, train_iters=6, lr=3e-2, save=save, save_at=(2,))
    return save


@pytest.fixture(scope="session")
def score_flags(datasets: tuple[str, str], teacher: Path) -> dict[str, Any]:
    return dict(teacher_load=teacher, data_path=datasets, tokenizer_type="ByteLevelTokenizer")


@pytest.fixture(scope="session")
def score_index(tmp_path_factory: pytest.TempPathFactory, score_flags: dict[str, Any]) -> Path:
    """Index of all windows, written by one rank without interruption."""
    output = tmp_path_factory.mktemp("scores") / "index"
    assert f"31 of {NUM_SAMPLES} samples in 8 blocks, 0 of them finished before" in score(**score_flags, output=output)
    return output


@pytest.fixture(scope="session")
def part_index(tmp_path_factory: pytest.TempPathFactory, score_flags: dict[str, Any]) -> Path:
    """Index of a random part of the windows, written by one rank without interruption."""
    output = tmp_path_factory.mktemp("part") / "index"
    printed = score(**score_flags, output=output, sample=0.4)
    count = int(ScoreIndex.open([str(output)]).manifest.scored(0, NUM_SAMPLES).sum())
    assert f"31 of {NUM_SAMPLES} samples, {count} of them by --sample 0.4 in 8 blocks" in printed
    assert f"the index: about 40.00% of {NUM_SAMPLES} windows, {0.4 * NUM_SAMPLES * SEQ_LENGTH:.3g} tokens, " in printed
    return output
