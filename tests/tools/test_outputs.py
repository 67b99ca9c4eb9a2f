"""All tools: an existing output is replaced only with --overwrite, and one process at a time writes an output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_salt.cli import run_tool
from megatron_salt.files import sole_writer
from megatron_salt.tools.merge_datasets import MergeConfig, merge_datasets
from megatron_salt.tools.merge_scores import MergeConfig as MergeScoresConfig
from megatron_salt.tools.merge_scores import merge_scores
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess
from megatron_salt.tools.python_corpus import CorpusConfig, write_corpus
from megatron_salt.tools.report import ReportConfig, report
from megatron_salt.tools.select_data import SelectConfig, select_data
from megatron_salt.tools.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from tests.metrics.logs import write_log
from tests.support.selections import files_in, manifest_of, random_rows, write_index

MANIFEST = manifest_of([45, 57])


def text(root: Path) -> Path:
    path = root / "text.jsonl"
    lines = [json.dumps({"text": f"line {i} of a small text with word{i * 7919 % 1000}"}) for i in range(400)]
    path.write_text("\n".join(lines) + "\n")
    return path


def dataset(root: Path) -> Path:
    words = ["--input", str(text(root)), "--output-prefix", str(root / "part"), "--tokenizer-type", "ByteLevelTokenizer"]
    assert run_tool(PreprocessConfig, preprocess, words) == 0
    return root / "part_text_document"


def scores(root: Path) -> Path:
    write_index(
        root / "scores", MANIFEST, random_rows(MANIFEST, median_zeroed_10=np.arange(MANIFEST.num_samples)), num_shards=2
    )
    return root / "scores"


Words = Callable[[Path], list[object]]
TOOLS: dict[str, tuple[type, Callable[[Any], int | None], Words, str]] = {
    "merge_datasets": (MergeConfig, merge_datasets, lambda root: ["--input", dataset(root)], "--output-prefix"),
    "train_tokenizer": (TrainTokenizerConfig, train_tokenizer, lambda root: ["--input", text(root), "--vocab-size", 320], "--output"),
    "merge_scores": (MergeScoresConfig, merge_scores, lambda root: ["--scores", scores(root)], "--output"),
    "select_data": (SelectConfig, select_data, lambda root: [
        "--scores", scores(root), "--score", "median_zeroed_10", "--fraction", 0.5, "--examples", 0], "--output"),
    "python_corpus": (CorpusConfig, write_corpus, lambda root: [], "--output-dir"),
    "report": (ReportConfig, report, lambda root: ["--run", write_log(root / "run", [3.0, 2.0])], "--output"),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_replaces_nothing_unasked_and_writes_alone(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, main, words_in, flag = TOOLS[tool]
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    output = out / "it"
    words = [*map(str, words_in(inputs)), flag, str(output)]

    with sole_writer(flag, output):
        assert run_tool(config, main, words) == 2
        assert f"error: {flag} {output} is being written by process" in capsys.readouterr().err
        assert list(files_in(out)) == ["it.lock"]
    assert run_tool(config, main, words) == 0
    written = files_in(out)
    assert written and not any(name.endswith((".lock", ".tmp")) for name in written)
    assert run_tool(config, main, words) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert files_in(out) == written
    assert run_tool(config, main, [*words, "--overwrite"]) == 0
    assert files_in(out).keys() == written.keys()
