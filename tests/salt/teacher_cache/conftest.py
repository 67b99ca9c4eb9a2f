"""Fixtures of this folder: data of a small run, and a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.program import train, write_tokens


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """More samples than a run draws."""
    return write_tokens(tmp_path_factory.mktemp("data") / "words", windows=80)


@pytest.fixture(scope="package")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A narrower model, which the program trained for some steps."""
    save = tmp_path_factory.mktemp("teacher")
    narrow = dict(hidden_size=16, ffn_hidden_size=48, untie_embeddings_and_output_weights=True)
    train(data_path=data, **narrow, train_iters=6, lr=3e-2, save=save)
    return save
