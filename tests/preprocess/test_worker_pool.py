"""--max-memory bounds chunks and documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_salt.errors import UserError
from megatron_salt.preprocess import worker_pool
from megatron_salt.preprocess.worker_pool import SizeLimits, fit_memory
from megatron_salt.tools.preprocess_data import main

LIMITS = SizeLimits(chunk=1 << 20, document=256 << 20)


def test_without_a_bound_the_limits_stay() -> None:
    assert fit_memory(LIMITS, None, 8) == LIMITS == fit_memory(LIMITS, 1000.0, 8)


def test_a_document_may_be_no_larger_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: processes, working memory, and 17 copies of the largest document in each worker fill the memory."""
    monkeypatch.setattr(worker_pool, "resident_bytes", lambda: 50 << 20)
    for max_memory, workers in ((0.5, 1), (1.0, 2), (4.0, 8)):
        limits = fit_memory(LIMITS, max_memory, workers)
        processes = workers + (1 if workers > 1 else 0)
        total = processes * (50 << 20) + workers * (96 << 20) + workers * 17 * limits.document
        assert 0 <= max_memory * 2**30 - total < workers * 17
        assert limits.chunk == min(LIMITS.chunk, limits.document) < LIMITS.document


def test_too_little_memory_is_refused_with_numbers() -> None:
    with pytest.raises(UserError, match=r"--max-memory 0.1 GiB is too little for --workers 3, which take 0\.\d+ GiB"):
        fit_memory(LIMITS, 0.1, 3)


def test_a_document_beyond_max_memory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (60 << 20)}) + "\n")
    words = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--output-prefix",
        str(tmp_path / "d"),
        "--tokenizer-type",
        "ByteLevelTokenizer",
    ]
    assert main([*words, "--max-memory", "1"]) == 2
    message = capsys.readouterr().err
    assert "has more than" in message and "--max-memory" in message and len(message.splitlines()) == 1
