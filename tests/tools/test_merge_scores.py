"""merge_scores: shards of one directory or several become what one job would have written; mistakes are refused and lose nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_salt.cli import run_tool
from megatron_salt.tools.merge_scores import MergeConfig, merge_scores
from tests.support.selections import files_in, manifest_of, random_rows, write_index, write_shard

MANIFEST = manifest_of([45, 1, 57])
ROWS = random_rows(MANIFEST)


def merge(*words: object) -> int:
    return run_tool(MergeConfig, merge_scores, [str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert merge(*words) == 2
    return capsys.readouterr().err


def test_merged_shards_are_byte_for_byte_what_one_job_writes(tmp_path: Path) -> None:
    write_index(tmp_path / "whole", MANIFEST, ROWS)
    for number in range(3):
        write_shard(tmp_path / ("a" if number else "b"), MANIFEST, ROWS, (number, 3))
    assert merge("--scores", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "new" / "merged") == 0
    assert files_in(tmp_path / "new" / "merged") == files_in(tmp_path / "whole")
    assert merge("--scores", tmp_path / "whole", "--output", tmp_path / "new" / "merged", "--overwrite") == 0
    assert files_in(tmp_path / "new" / "merged") == files_in(tmp_path / "whole")


def test_mistakes_are_refused_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_index(tmp_path / "a", MANIFEST, ROWS, num_shards=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    before = files_in(tmp_path)
    for message, words in [
        ("is one of --scores", ("--output", tmp_path / "a", "--overwrite")),
        ("exists; --overwrite replaces it", ("--output", tmp_path / "full")),
        ("does not delete anything else", ("--output", tmp_path / "full", "--overwrite")),
        ("is no score index", ("--scores", tmp_path / "full", "--output", tmp_path / "new")),
        ("cannot be written: File exists", ("--output", tmp_path / "full" / "thesis.tex" / "merged")),
    ]:
        words = words if "--scores" in words else ("--scores", tmp_path / "a", *words)
        assert message in refused(capsys, *words), message
        assert files_in(tmp_path) == before
    shutil.rmtree(next((tmp_path / "a").glob("samples-*")))
    assert "of 103 samples are not scored" in refused(capsys, "--scores", tmp_path / "a", "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_replaced_is_there_until_the_new_index_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    write_index(tmp_path / "new", MANIFEST, random_rows(MANIFEST, seed=1), num_shards=3)
    write_index(tmp_path / "expected", MANIFEST, random_rows(MANIFEST, seed=1))
    write_index(tmp_path / "old", MANIFEST, ROWS)
    before = files_in(tmp_path)
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if Path(source).name == "old.tmp":
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    assert "Input/output error" in refused(capsys, "--scores", tmp_path / "new", "--output", tmp_path / "old", "--overwrite")
    assert files_in(tmp_path) == before
    monkeypatch.undo()
    (tmp_path / "old").rename(tmp_path / "old.old")  # what a kill leaves between two renamings
    message = refused(capsys, "--scores", tmp_path / "new", "--output", tmp_path / "old", "--overwrite")
    assert "move it back" in message and str(tmp_path / "old.old") in message
    (tmp_path / "old.old").rename(tmp_path / "old")
    assert merge("--scores", tmp_path / "new", "--output", tmp_path / "old", "--overwrite") == 0
    assert files_in(tmp_path / "old") == files_in(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "new", "old"]


def test_a_link_in_the_place_of_the_output_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    write_index(tmp_path / "a", MANIFEST, ROWS, num_shards=3)
    write_index(tmp_path / "there", MANIFEST, ROWS)
    before = files_in(tmp_path / "there")
    (tmp_path / "out").symlink_to(tmp_path / "there")
    assert merge("--scores", tmp_path / "a", "--output", tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out").is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["a", "out", "there"]
    assert files_in(tmp_path / "there") == before == files_in(tmp_path / "out")


def test_a_directory_that_holds_the_scores_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_index(tmp_path / "out", MANIFEST, ROWS)
    write_index(tmp_path / "out" / "inside", MANIFEST, ROWS, num_shards=3)
    before = files_in(tmp_path)
    assert "which would be deleted" in refused(
        capsys, "--scores", tmp_path / "out" / "inside", "--output", tmp_path / "out", "--overwrite"
    )
    assert files_in(tmp_path) == before
