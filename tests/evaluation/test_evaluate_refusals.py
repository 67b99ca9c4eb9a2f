"""What tools/evaluate.py cannot use is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_salt.parallel.hardware import COMPILE_WORKERS
from megatron_salt.tools import evaluate as tool
from tests.evaluation.conftest import Files, main
from tests.support.ranks import run_ranks


def test_windows_longer_than_a_model_takes_name_the_checkpoint(
    files: Files, short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--load", files.loads[0], short, "--data", "a=x", "--seq-length", "48", "--output", str(tmp_path / "r.json")]
    assert tool.main(words) == 2
    assert f"--seq-length 48 is longer than the 32 tokens that the model of --load {short} takes" in capsys.readouterr().err


def test_of_several_checkpoints_the_message_names_the_one_that_cannot(
    files: Files, short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "long.jsonl"
    task.write_text(json.dumps({"context": "a", "continuation": "b" * 40}))
    more = ["--tasks", str(task), "--output", str(tmp_path / "r.json")]
    assert tool.main(["--load", files.loads[0], short, *more]) == 2
    err = capsys.readouterr().err
    assert f"long.jsonl, line 1: the continuation has 40 tokens, the model takes 32 (with --load {short})\n" in err
    assert tool.main(["--load", short, *more]) == 2
    assert capsys.readouterr().err.endswith("the model takes 32\n")


@pytest.mark.parametrize("spelled", ["", "/iter_0000010", "/../salt"])
def test_one_checkpoint_under_two_names_is_refused(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], spelled: str
) -> None:
    load = files.loads[0]
    words = ["--load", load, load + spelled, "--tasks", files.tasks[0], "--output", str(tmp_path / "r.json")]
    assert tool.main(words) == 2
    err = capsys.readouterr().err
    assert f"--load {load} and {load}{spelled} are the same checkpoint, iter_0000010; give it once" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, more", [("", []), ("", ["--overwrite"]), ("r.json", [])])
def test_an_output_that_is_a_directory_is_refused_as_such(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, more: list[str]
) -> None:
    (tmp_path / "r.md").mkdir()
    assert tool.main(files.words(tmp_path / name, *more)) == 2
    err = capsys.readouterr().err
    assert f"--output {tmp_path / (name and 'r.md')} is a directory" in err and "--overwrite" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["r.md"]


@pytest.mark.parametrize(
    "more, complaint",
    [
        (["--metrics", "f1"], "--metrics f1 is no metric"),
        (["--shots", "2"], "--shots 2 needs a --shot-file for each of 3 --tasks, got 0"),
        (["--shot-file", "x.jsonl"], "--shot-file needs --shots"),
        (["--add-bos", "yes"], "--add-bos yes: the ByteLevelTokenizer declares no beginning-of-sequence token"),
        (["--add-bos", "maybe"], "--add-bos maybe is not one of auto, no, yes"),
        (["--data", "prose"], "--data prose is not of the form NAME=PREFIX"),
        (["--data", "a=x", "a=y"], "--data a=y: a is the name of another set too"),
        (["--data", "weather=x"], "--data weather=x: weather is the name of a task too"),
        (["--data", "a=/nowhere/x"], "--data /nowhere/x"),
        (["--seq-length", "8"], "--seq-length 8 needs --data"),
        (["--data", "a=x", "--seq-length", "0"], "--seq-length must be at least 1, got 0"),
        (["--batch-tokens", "0"], "--batch-tokens must be at least 1, got 0"),
        (["--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    assert tool.main(files.words(tmp_path / "r.json", *more)) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_holds_no_results_is_not_replaced(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    output.write_text('{"format": 9}')
    [ended] = run_ranks(1, main, files.words(output))
    assert ended.status == 2 and "r.json exists and cannot be added to: it holds no results of this format" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_the_tool_bounds_the_processes_that_compile_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPILE_WORKERS, "")
    monkeypatch.delenv(COMPILE_WORKERS)
    words = ["--load", str(tmp_path), "--tasks", str(tmp_path / "absent.jsonl"), "--output", str(tmp_path / "results.json")]
    assert tool.main(words) == 2
    assert os.environ[COMPILE_WORKERS] == "4"
