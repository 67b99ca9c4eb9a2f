"""The same data twice is refused by name, whatever the names are; --allow-duplicate-inputs allows it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.cli import run_tool
from megatron_salt.config import DataConfig
from megatron_salt.data.duplicate_inputs import refuse_repeated_files
from megatron_salt.data.manifest import read_manifest
from megatron_salt.data.samples import open_training_data
from megatron_salt.errors import UserError
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.tools.merge_datasets import MergeConfig, merge_datasets
from megatron_salt.tools.merge_scores import MergeConfig as MergeScoresConfig
from megatron_salt.tools.merge_scores import merge_scores
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess
from megatron_salt.tools.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from tests.support.datasets import WriteDataset
from tests.support.selections import files_in, manifest_of, random_rows, write_index, write_shard

ALLOW = "--allow-duplicate-inputs"
AGAIN: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, again: again.symlink_to(path),
    "hard link": lambda path, again: os.link(path, again),
    "copy": shutil.copy,
    "folder": lambda path, again: (again.parent / "folder").symlink_to(path.parent),
}


def tokenise(prefix: Path, *words: object) -> int:
    return run_tool(
        PreprocessConfig,
        preprocess,
        ["--input", *map(str, words), "--output-prefix", str(prefix), "--tokenizer-type", "ByteLevelTokenizer"],
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20)))
    return path


@pytest.mark.parametrize("how", AGAIN)
def test_a_file_under_two_names_is_refused_and_counts_twice_where_allowed(tmp_path, corpus, capsys, how):
    again = tmp_path / "b.jsonl"
    AGAIN[how](corpus, again)
    names = [corpus, again if again.exists() else tmp_path / "folder" / "a.jsonl"]
    assert tokenise(tmp_path / "out" / "d", *names) == 2
    message = capsys.readouterr().err
    assert all(str(name) in message for name in names) and ALLOW in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert tokenise(tmp_path / "out" / "d", *names, ALLOW) == 0
    manifest = read_manifest(str(tmp_path / "out" / "d_text_document"))
    assert manifest is not None and manifest.documents == 40


def test_a_tokenizer_is_trained_on_each_file_once(tmp_path, corpus, capsys):
    (tmp_path / "b.jsonl").symlink_to(corpus)
    words = ["--input", str(corpus), str(tmp_path / "*.jsonl"), "--output", str(tmp_path / "m"), "--vocab-size", "280"]
    assert run_tool(TrainTokenizerConfig, train_tokenizer, words) == 2
    assert "names one file twice" in capsys.readouterr().err
    assert run_tool(TrainTokenizerConfig, train_tokenizer, [*words, ALLOW]) == 0


def test_files_of_one_size_or_of_no_bytes_or_that_are_documents_may_lie_beside_each_other(tmp_path):
    contents = {"a": b"x" * 10, "b": b"y" * 10, "c": b"", "d": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    refuse_repeated_files("--input", [str(tmp_path / name) for name in contents], lambda path: True)
    shutil.copy(tmp_path / "a", tmp_path / "e")
    refuse_repeated_files("--input", [str(tmp_path / name) for name in "ae"], lambda path: False)


def test_equal_size_and_equal_blocks_are_no_proof(tmp_path):
    """Two files that differ only between the blocks of the sampled hash."""
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    content.tofile(tmp_path / "a")
    content[50_000] ^= 1
    content.tofile(tmp_path / "b")
    refuse_repeated_files("--input", [str(tmp_path / "a"), str(tmp_path / "b")], lambda path: True)


def open_data(*data_path: str, allow: bool = False) -> int:
    train, _ = open_training_data(DataConfig(data_path=data_path, allow_duplicate_inputs=allow), 4, 1, 1000, None)
    return len(train)


@pytest.mark.parametrize("how", ["link", "hard link", "copy"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_blend_takes_a_dataset_once(tmp_path, write_dataset: WriteDataset, how, weights):
    one = write_dataset("one", [list(range(100)), list(range(50))])
    write_dataset("other", [list(range(1, 101)), list(range(50))])
    for suffix in (".bin", ".idx"):
        AGAIN[how](Path(one + suffix), tmp_path / f"again{suffix}")
    again = str(tmp_path / "again")
    names = [one, str(tmp_path / "other"), again]
    words = [word for name in names for word in (["0.5", name] if weights else [name])]
    with pytest.raises(UserError, match=f"^--data-path names .*{one}.* and .*{again}.*{ALLOW}"):
        open_data(*words)
    assert open_data(*words, allow=True) == 3 * open_data(one)
    assert open_data(*words[: -1 - weights]) == 2 * open_data(one)
    with pytest.raises(UserError, match="^--data-path names one dataset twice"):
        open_data(one, f"{tmp_path}/./one")
    with pytest.raises(UserError, match="^--data-path names .*one twice"):
        open_data(one, one)
    with pytest.raises(UserError, match="^--valid-data-path names .*one twice"):
        open_training_data(DataConfig(data_path=(one,), valid_data_path=(one, one)), 4, 1, 1000, None)


def test_a_dataset_and_one_of_its_parts_share_a_source(tmp_path, corpus, capsys):
    other = corpus.with_name("b.jsonl")
    other.write_text('{"text": "something else, at some length"}\n')
    assert tokenise(tmp_path / "whole", corpus, other) == 0 and tokenise(tmp_path / "part", corpus) == 0
    prefixes = [f"{tmp_path}/{name}_text_document" for name in ("whole", "part")]
    with pytest.raises(UserError, match=f"{prefixes[0]} and {prefixes[1]}, which were both made of {corpus}"):
        open_data(*prefixes)
    words = ["--input", *prefixes, "--output-prefix", str(tmp_path / "merged")]
    assert run_tool(MergeConfig, merge_datasets, words) == 2 and str(corpus) in capsys.readouterr().err
    assert run_tool(MergeConfig, merge_datasets, [*words, ALLOW]) == 0
    assert read_manifest(str(tmp_path / "merged")).documents == 41


def test_two_keys_of_one_file_are_two_datasets(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a long enough text", "title": "another text"}\n')
    assert tokenise(tmp_path / "d", path, "--json-keys", "text", "title") == 0
    assert open_data(f"{tmp_path}/d_text_document", f"{tmp_path}/d_title_document") > 0


def test_a_shard_of_a_dataset_comes_once(tmp_path, corpus, capsys):
    """Two shards 0/2: one preprocessing, and another of different input files, as many."""
    other = corpus.with_name("b.jsonl")
    other.write_text('{"text": "something else, at some length"}\n' * 2)
    third = corpus.with_name("c.jsonl")
    third.write_text('{"text": "a third text"}\n' * 9)
    for name, files in (("x", [corpus, other]), ("y", [third, other])):
        for i in range(2):
            assert tokenise(tmp_path / name, *files, "--shard", f"{i}/2") == 0
    parts = [f"{tmp_path}/{name}-0000{i}-of-00002_text_document" for name, i in (("x", 0), ("y", 0), ("x", 1))]
    words = ["--input", *parts, "--output-prefix", str(tmp_path / "merged")]
    assert run_tool(MergeConfig, merge_datasets, words) == 2
    assert f"names shard 0/2 twice, as {parts[0]} and as {parts[1]}" in capsys.readouterr().err
    assert run_tool(MergeConfig, merge_datasets, [*words, ALLOW]) == 0


def test_scores_named_twice_are_refused_and_count_once_where_allowed(tmp_path, capsys):
    manifest = manifest_of([45, 1, 57])
    rows = random_rows(manifest)
    write_index(tmp_path / "whole", manifest, rows)
    for number in range(3):
        write_shard(tmp_path / "a", manifest, rows, (number, 3))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    write_shard(tmp_path / "copied", manifest, rows, (1, 3))
    for names, told in (
        (["a", "a"], "twice"),
        (["a", "link"], "one directory twice"),
        (["a", "copied"], "hold the same scores of"),
    ):
        paths = [str(tmp_path / name) for name in names]
        with pytest.raises(UserError, match=f"--scores names .*{told}.*{ALLOW}"):
            ScoreIndex.open(paths)
        output = tmp_path / "-".join(names)
        words = ["--scores", *paths, "--output", str(output)]
        assert run_tool(MergeScoresConfig, merge_scores, words) == 2 and not output.exists()
        assert run_tool(MergeScoresConfig, merge_scores, [*words, ALLOW]) == 0
        assert files_in(output) == files_in(tmp_path / "whole")
