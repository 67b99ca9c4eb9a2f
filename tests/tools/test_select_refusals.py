"""select_data: mistakes are refused by name and lose nothing; outputs are replaced only when asked."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.manifest import DatasetFacts
from tests.support.selections import (
    chosen,
    files_in,
    manifest_of,
    random_rows,
    select,
    write_index,
    write_scored_datasets,
)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return write_scored_datasets(tmp_path)


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "--rule top takes either --fraction or --num-samples"),
        (("--fraction", 0.5, "--num-samples", 3), "--rule top takes either --fraction or --num-samples"),
        (("--fraction", 1.5), "--fraction must be above 0 and at most 1, got 1.5"),
        (("--fraction", 0), "--fraction must be above 0 and at most 1, got 0"),
        (("--num-samples", 0), "--num-samples must be at least 1, got 0"),
        (("--num-samples", 32), "32"),
        (("--fraction", 0.5, "--score", "best"), "--score best is not a score of the index: it has median_zeroed_1, "),
        (("--fraction", 0.5, "--score", "content"), "--score content is not a score of the index"),
        (("--fraction", 0.5, "--min-score", 1), "--min-score does not go with --rule top, which takes --fraction --num-samples"),
        (("--fraction", 0.5, "--rule", "threshold", "--min-score", 1), "--fraction does not go with --rule threshold"),
        (("--rule", "threshold"), "--rule threshold needs --min-score"),
        (("--rule", "threshold", "--min-score", 99), "99"),
        (("--rule", "band", "--fraction", 0.5), "--rule band needs --band-skip"),
        (("--fraction", 0.5, "--seed", 1), "--seed does not go with --rule top"),
        (("--fraction", 0.5, "--rule", "random", "--tie-seed", 1), "--tie-seed does not go with --rule random"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(index: Path, words: tuple, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(index.parent)
    assert select(index, *words) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert files_in(index.parent) == before


def test_what_is_there_is_replaced_only_when_asked(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert select(index, "--num-samples", 3) == 0
    assert select(index, "--num-samples", 4) == 2
    assert "chosen.json" in (err := capsys.readouterr().err) and "--overwrite replaces it" in err
    assert len(chosen(index)) == 3
    assert select(index, "--num-samples", 4, "--overwrite") == 0
    assert len(chosen(index)) == 4


def test_damaged_and_nan_scores_are_refused(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    column = next(index.glob("samples-*/median_dropped_10.npy"))
    content = column.read_bytes()
    column.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
    assert select(index, "--num-samples", 3) == 2
    assert str(column) in capsys.readouterr().err
    manifest = manifest_of([40])
    scores = np.arange(40.0)
    scores[[7, 9]] = np.nan
    write_index(index.parent / "nan", manifest, random_rows(manifest, median_dropped_10=scores))
    assert select(index.parent / "nan", "--num-samples", 3) == 2
    assert "2" in (err := capsys.readouterr().err) and "NaN" in err and "7" in err
    assert not (index.parent / "chosen.npy").exists()


def test_datasets_that_are_equal_give_their_windows_twice_where_allowed_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of([1], datasets=tuple(DatasetFacts(name, "content:same", 9) for name in ("one", "two")))
    write_index(tmp_path / "scores", manifest, random_rows(manifest))
    assert select(tmp_path / "scores", "--fraction", 0.5) == 2
    assert "--scores are of one and two, which hold the same tokens" in capsys.readouterr().err
    assert select(tmp_path / "scores", "--fraction", 0.5, "--allow-duplicate-inputs") == 0
    assert (
        select(tmp_path / "scores", "--fraction", 0.5, "--overwrite", "--scores", tmp_path / "scores", tmp_path / "scores") == 2
    )
    assert "--scores names" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (("--fraction", "0.5", "--tie-seed", "-1"), "--tie-seed must be from 0 to 2^63 - 1"),
    (("--fraction", "0.5", "--tie-seed", 10**30), "--tie-seed must be from 0 to 2^63 - 1"),
    (("--fraction", "0.5", "--rule", "random", "--seed", 10**30), "--seed must be from 0 to 2^63 - 1"),
    (("--rule", "threshold", "--min-score", "-inf"), "--min-score must be a finite number"),
    (("--rule", "threshold", "--min-score", "0", "--max-score", "inf"), "--max-score must be finite"),
    (("--fraction", "0.5", "--exclude-duplicates", "--max-memory-gib", "1e300"), "--max-memory-gib must be above 0"),
    (("--fraction", "0.5", "--output", ""), "names no selection"),
    (("--fraction", "0.5", "--output", "nowhere/.npy"), "names no selection"),
])  # fmt: skip
def test_what_no_selection_could_record_is_refused_before_anything_is_written(index, capsys, words, message):
    before = files_in(index.parent)
    assert select(index, *words) == 2
    assert message in capsys.readouterr().err
    assert files_in(index.parent) == before


@pytest.mark.parametrize("name", ["chosen.json", "chosen.npy", "chosen.txt", "chosen", "scores/texts.jsonl"])
def test_exported_documents_replace_no_other_file_of_the_selection(index, capsys, name):
    before = files_in(index.parent)
    assert select(index, "--fraction", "0.5", "--overwrite", "--export-documents", index.parent / name) == 2
    assert "--export-documents" in capsys.readouterr().err
    assert files_in(index.parent) == before


def test_a_full_disk_keeps_the_selection_that_is_there_and_leaves_no_remains(index, capsys, monkeypatch):
    assert select(index, "--fraction", "0.5") == 0
    before, dumps = files_in(index.parent), json.dumps

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("megatron_salt.data.json_records.json.dump", full)
        assert select(index, "--fraction", "0.25", "--overwrite") == 2
    assert "No space left" in capsys.readouterr().err
    assert files_in(index.parent) == before
    with monkeypatch.context() as patch:
        patch.setattr(
            "megatron_salt.tools.select_data.json.dumps",
            lambda row, **kinds: full() if "window" in row else dumps(row, **kinds),
        )
        assert select(index, "--fraction", "0.25", "--overwrite", "--export-documents", index.parent / "texts.jsonl") == 2
    assert not list(index.parent.glob("*.tmp"))
