"""preprocess_data --resume with a complete dataset: one that this run would write is kept, any other is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_salt.cli import run_tool
from megatron_salt.tools import preprocess_data
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess
from tests.preprocess.test_resume import corpus, files_in, run


def test_a_finished_run_has_nothing_to_resume(tmp_path, capsys):
    inputs = corpus(tmp_path)
    assert run(inputs, tmp_path / "out", "--resume") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert run(inputs, tmp_path / "out", "--resume") == 0 and "already whole" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda inputs, out: run(inputs[:1], out, "--resume"), "other --input"),
        (lambda inputs, out: run(inputs, out, "--resume", "--no-append-eod"), "other --append-eod"),
        (lambda inputs, out: run(inputs, out, "--resume", "--dedup", "exact"), "other --dedup"),
        (lambda inputs, out: run(inputs, out, "--resume", "--shuffle-documents", "1"), "other --shuffle-documents"),
        (lambda inputs, out: edited(inputs) and run(inputs, out, "--resume"), "other --input"),
    ],
)
def test_a_whole_dataset_that_was_made_otherwise_is_not_called_whole(tmp_path, capsys, change, word):
    inputs = corpus(tmp_path)
    assert run(inputs, tmp_path / "out") == 0
    before = files_in(tmp_path / "out")
    capsys.readouterr()
    assert change(inputs, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert word in captured.err and "--overwrite replaces it" in captured.err and "already whole" not in captured.out
    assert files_in(tmp_path / "out") == before


def edited(inputs) -> bool:
    """Change a letter in the first file, but not its size."""
    path = Path(str(inputs[0]))
    path.write_bytes(
        path.read_bytes().replace(b"e", b"i", 1) if path.suffix not in (".gz", ".zst") else path.read_bytes()[::-1]
    )
    return True


def _finished(home: Path, *flags: str) -> int:
    words = [
        "--input",
        str(home / "x.txt"),
        "--output-prefix",
        str(home / "x"),
        "--tokenizer-type",
        "ByteLevelTokenizer",
        *flags,
    ]
    return run_tool(PreprocessConfig, preprocess, words)


@pytest.mark.parametrize("flags", [("--dedup", "exact"), ("--text-documents", "file"), ()])
def test_what_other_flags_or_another_text_made_is_not_whole(tmp_path, capsys, flags):
    (tmp_path / "x.txt").write_text("one\ntwo\none\n")
    assert _finished(tmp_path) == 0 and _finished(tmp_path, "--resume") == 0
    assert "already whole" in capsys.readouterr().out
    if not flags:
        (tmp_path / "x.txt").write_text("one\nsix\none\n")  # as long
    assert _finished(tmp_path, "--resume", *flags) == 2
    assert "is whole, and was made with other --" in capsys.readouterr().err


def test_a_finished_dataset_that_was_damaged_is_not_whole(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("one\ntwo\none\n")
    assert _finished(tmp_path) == 0
    (tmp_path / "x_text_document.bin").write_bytes(b"short")
    assert _finished(tmp_path, "--resume") == 2
    assert "has 5 bytes" in (err := capsys.readouterr().err) and "--overwrite" in err


def test_a_dataset_that_went_away_before_its_journal_did_is_not_called_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    with monkeypatch.context() as patch:
        patch.setattr(preprocess_data, "clean", lambda *_: None)  # killed before the journal was deleted
        assert _finished(tmp_path, "--resume") == 0
    (tmp_path / "x_text_document.bin").rename(tmp_path / "moved")
    capsys.readouterr()
    for _ in range(2):
        assert _finished(tmp_path, "--resume") == 2
        assert "x_text_document.bin is not there" in capsys.readouterr().err
    assert _finished(tmp_path, "--overwrite") == 0
