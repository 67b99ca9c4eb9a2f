"""Fixtures of the refusal tests."""

from __future__ import annotations

import pytest

from tests.support.program import write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a small dataset."""
    return write_tokens(tmp_path_factory.mktemp("data") / "words")
