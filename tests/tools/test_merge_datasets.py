"""merge_datasets: shards merged are what one job writes, byte for byte; what does not belong together is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: its imports expect a GPU)

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_salt.cli import run_tool
from megatron_salt.data.manifest import read_manifest
from megatron_salt.preprocess import indexed_writer
from megatron_salt.tools.merge_datasets import MergeConfig, merge_datasets
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess
from tests.support.datasets import files_in

BYTES = ["--tokenizer-type", "ByteLevelTokenizer"]


def run(inputs: list[str], prefix: Path, *flags: str) -> int:
    return run_tool(PreprocessConfig, preprocess, ["--input", *inputs, "--output-prefix", str(prefix), *BYTES, *flags])


def merge(inputs: list[Path], prefix: Path, *flags: str) -> int:
    return run_tool(MergeConfig, merge_datasets, ["--input", *map(str, inputs), "--output-prefix", str(prefix), *flags])


@pytest.fixture
def corpus(tmp_path) -> list[str]:
    for number in range(7):
        texts = [f"document {i} of file {number} 🎉" * (i % 5 + 1) for i in range(3 * number + 1)]
        (tmp_path / f"f{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(tmp_path / "f?.jsonl")]


def shards(corpus: list[str], out: Path, n: int, *flags: str) -> list[Path]:
    for i in range(n):
        assert run(corpus, out / "s", "--shard", f"{i}/{n}", *flags) == 0
    return [out / f"s-{i:05d}-of-{n:05d}_text_document" for i in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [(1 << 16, 1 << 20), (1, 1), (5, 300)])
def test_merged_shards_are_what_one_job_writes(tmp_path, corpus, monkeypatch, n, batch):
    monkeypatch.setattr(indexed_writer, "_BATCH_DOCUMENTS", batch[0])
    monkeypatch.setattr(indexed_writer, "_BATCH_TOKENS", batch[1])
    assert run(corpus, tmp_path / "whole/d", "--append-eod") == 0
    if n == 1:
        parts = [tmp_path / "whole/d_text_document"]
    else:
        parts = [tmp_path / f"parts/s-*-of-{n:05d}_text_document"]
        assert all(
            read_manifest(str(part)).shard == f"{i}/{n}"
            for i, part in enumerate(shards(corpus, tmp_path / "parts", n, "--append-eod"))
        )
    assert merge(parts, tmp_path / "merged/d_text_document") == 0
    assert files_in(tmp_path / "merged") == files_in(tmp_path / "whole")


def foreign(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_datasets_of_other_tools_are_merged_without_a_manifest(tmp_path, capsys):
    parts = [foreign(tmp_path / "a", [[1, 2], [3]]), foreign(tmp_path / "b", [[4], [5, 6, 7]])]
    assert merge(parts, tmp_path / "c") == 0 and "without a manifest" in capsys.readouterr().out
    foreign(tmp_path / "d", [[1, 2], [3], [4], [5, 6, 7]])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"c{suffix}").read_bytes() == (tmp_path / f"d{suffix}").read_bytes()
    assert [document.tolist() for document in IndexedDataset(str(tmp_path / "c"))] == [[1, 2], [3], [4], [5, 6, 7]]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{suffix}" for name in "abcd" for suffix in ("bin", "idx")}


def swap_bytes(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda parts: swap_bytes(Path(f"{parts[1]}.bin"), 50), "content hash"),
        (lambda parts: swap_bytes(Path(f"{parts[1]}.idx"), 60), "damaged|content hash"),
        (lambda parts: Path(f"{parts[1]}.bin").write_bytes(b"12"), "truncated"),
        (lambda parts: Path(f"{parts[1]}.idx").unlink(), "no such dataset"),
        (lambda parts: parts.pop(), "lacks shards 2/3"),
        (lambda parts: parts.reverse(), "out of order"),
        (lambda parts: parts.append(parts[0]), "twice"),
        (lambda parts: parts.append(foreign(Path(f"{parts[0]}_x"), [[1]], np.int32)), "holds int32"),
    ],
)
def test_damage_and_disorder_are_found_by_name_and_leave_nothing(tmp_path, corpus, capsys, damage, word):
    parts = shards(corpus, tmp_path / "parts", 3)
    damage(parts)
    before = files_in(tmp_path)
    assert merge(parts, tmp_path / "merged/d") == 2
    message = capsys.readouterr().err
    assert any(each in message for each in word.split("|")) and "--input" in message and files_in(tmp_path) == before


def test_parts_of_other_settings_are_refused(tmp_path, corpus, capsys):
    assert run(corpus, tmp_path / "a") == 0 and run(corpus, tmp_path / "b", "--append-eod") == 0
    parts = [tmp_path / "a_text_document", tmp_path / "b_text_document"]
    assert merge(parts, tmp_path / "c") == 2 and "append_eod" in capsys.readouterr().err
    assert merge(parts[:1], parts[0]) == 2 and "is one of --input" in capsys.readouterr().err
    assert merge(parts[:1], parts[1]) == 2 and "--overwrite" in capsys.readouterr().err
    assert merge(parts[:1], parts[1], "--overwrite") == 0


def test_more_shards_than_files_are_refused(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path / "d", "--shard", "0/8") == 2
    assert "--input names 7 files, which cannot be divided into 8 parts" in capsys.readouterr().err


def test_a_link_in_the_place_of_an_output_is_replaced_and_what_it_names_stays(tmp_path, corpus):
    parts = shards(corpus, tmp_path / "out", 2)
    assert merge(parts, tmp_path / "whole") == 0
    (tmp_path / "whole.tokenizer").rename(tmp_path / "kept")
    (tmp_path / "whole.tokenizer").symlink_to(tmp_path / "kept")
    before = files_in(tmp_path / "kept")
    assert merge(parts, tmp_path / "whole", "--overwrite") == 0
    assert files_in(tmp_path / "kept") == before == files_in(tmp_path / "whole.tokenizer")
    assert not (tmp_path / "whole.tokenizer").is_symlink() and (tmp_path / "whole.idx").exists()


def test_a_directory_under_the_name_of_an_output_is_not_deleted(tmp_path, corpus, capsys):
    parts = shards(corpus, tmp_path / "out", 2)
    assert merge(parts, tmp_path / "whole") == 0
    (tmp_path / "whole.manifest.json").unlink()
    (tmp_path / "whole.manifest.json").mkdir()
    (tmp_path / "whole.manifest.json" / "thesis.tex").write_text("years")
    before = files_in(tmp_path)
    assert merge(parts, tmp_path / "whole", "--overwrite") == 2
    assert "whole.manifest.json" in capsys.readouterr().err
    assert files_in(tmp_path) == before


def test_a_part_without_a_manifest_hides_no_mixture_of_the_others(tmp_path, corpus, capsys):
    for name, flags in (("plain", ()), ("ended", ("--append-eod",)), ("bare", ())):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
        assert run([str(tmp_path / f"{name}.jsonl")], tmp_path / name, *flags) == 0
    (tmp_path / "bare_text_document.manifest.json").unlink()
    assert merge([tmp_path / f"{name}_text_document" for name in ("bare", "plain", "ended")], tmp_path / "out") == 2
    assert "append_eod of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".", "..", "out/"])
def test_a_prefix_without_a_name_is_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert run_tool(MergeConfig, merge_datasets, ["--input", "a", "--output-prefix", name]) == 2
    assert "names no dataset" in capsys.readouterr().err and not list(tmp_path.iterdir())
