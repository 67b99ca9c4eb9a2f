"""What tools/evaluate.py cannot use is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from megatron_salt.config import DataConfig, TokenizerConfig
from megatron_salt.data.manifest import tokenizer_directory
from megatron_salt.errors import UserError
from megatron_salt.parallel.hardware import COMPILE_WORKERS
from megatron_salt.tokenizer.id_bytes import _byte_level_alphabet
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer
from megatron_salt.tools import evaluate as tool
from megatron_salt.tools.evaluated.data import open_data
from tests.evaluation.conftest import Files, main
from tests.support.datasets import run as preprocess
from tests.support.datasets import write_lines
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


def other_tokenizer(path: Path, shift: int = 0, end: str = "<|endoftext|>") -> Tokenizer:
    """A tokenizer.json whose ids are those of the byte-level tokenizer, each byte moved by `shift`."""
    library = Library(models.BPE(vocab={one: (byte + shift) % 256 for one, byte in _byte_level_alphabet().items()}, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>", "<other>"])
    library.save(str(path))
    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path), eod_token=end))


def test_data_of_another_tokenizer_is_taken_where_its_ids_mean_the_same(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "d.jsonl", ["ça et là"] * 20)
    assert preprocess(lines, tmp_path / "d", "--append-eod") == 0
    prefix = f"{tmp_path}/d_text_document"
    same, shifted = other_tokenizer(tmp_path / "same.json"), other_tokenizer(tmp_path / "shifted.json", shift=1)
    assert len(open_data("d", prefix, same, DataConfig(), 16).samples) == 13
    with pytest.raises(
        UserError, match=r"--data d=.* was made with tokenizer .*: 256 of 257 ids mean something else to the checkpoint"
    ):
        open_data("d", prefix, shifted, DataConfig(), 16)
    moved_end = other_tokenizer(tmp_path / "end.json", end="<other>")
    with pytest.raises(UserError, match="its documents end in id 256, those of the checkpoint in 257"):
        open_data("d", prefix, moved_end, DataConfig(), 16)
    tokenizer_directory(prefix).rename(tmp_path / "away")
    with pytest.raises(UserError, match=rf"cannot be seen without {prefix}"):
        open_data("d", prefix, same, DataConfig(), 16)
