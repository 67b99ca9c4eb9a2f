"""Write score indices with any rows, and selections of any ids; run select_data in this process and read its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_salt.cli import run_tool
from megatron_salt.config import TokenizerConfig
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.manifest import DatasetFacts, fingerprint, tokenizer_directory
from megatron_salt.data.windows import Windows
from megatron_salt.preprocess.indexed_writer import IndexedWriter
from megatron_salt.selection.score_format import IndexManifest, claim, columns, content_hashes, npy_header, shard_blocks
from megatron_salt.selection.score_reader import ScoreIndex, Shard
from megatron_salt.selection.score_writer import ShardWriter
from megatron_salt.selection.selection_file import Selection, write_selection
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.tools.select_data import SelectConfig, select_data

TOP_K = (1, 10)
LENGTH = 16
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
TEXTS = (
    "the cat sat on the mat and then sat on it again, all day long. " * 9,
    "import os; import sys; print(os.sep, sys.path)\n" * 9,
)


def manifest_of(sizes: Sequence[int], block_samples: int = 8, **facts: object) -> IndexManifest:
    """Manifest of an index of datasets `d0`, `d1`, ... with `sizes` samples."""
    datasets = tuple(DatasetFacts(f"d{number}", f"content:{number}", size) for number, size in enumerate(sizes))
    masking = {"eod_mask_loss": False, "reset_position_ids": False, "reset_attention_mask": True}
    values = dict(
        datasets=datasets,
        seq_length=16,
        vocabulary=257,
        tokenizer="t",
        teacher="w",
        teacher_step=7,
        teacher_directory="runs/t",
        top_k=TOP_K,
        masking=masking,
        dtype="float32",
        micro_batch_size=2,
        block_samples=block_samples,
    )
    return IndexManifest(**(values | facts))


def random_rows(manifest: IndexManifest, seed: int = 0, **given: np.ndarray) -> dict[str, np.ndarray]:
    """Rows with the given columns, and random numbers in all others."""
    random = np.random.default_rng(seed)
    kinds = columns(manifest.top_k, manifest.seq_length)
    rows = {name: random.integers(1, 50, manifest.num_samples).astype(dtype) for name, dtype in kinds.items()}
    rows["content"] = random.permutation(manifest.num_samples).astype(np.uint64) << np.uint64(40)
    return rows | {name: values.astype(kinds[name]) for name, values in given.items()}


def write_blocks(writer: ShardWriter, manifest: IndexManifest, rows: Mapping[str, np.ndarray], blocks: Sequence[int]) -> None:
    """Write `blocks` as a scoring job does."""
    for block in blocks:
        here = slice(block * manifest.block_samples, (block + 1) * manifest.block_samples)
        writer.write(block, {name: values[here] for name, values in rows.items()})


def write_shard(directory: Path, manifest: IndexManifest, rows: Mapping[str, np.ndarray], shard: tuple[int, int]) -> Path:
    """Write a shard as one job of an array does, from its start or from where another job stopped. Returns its directory."""
    claim(directory, manifest)
    writer = ShardWriter(directory, manifest, shard_blocks(manifest.num_blocks, shard))
    write_blocks(writer, manifest, rows, list(writer.todo))
    writer.finish()
    return writer.path


def write_index(directory: Path, manifest: IndexManifest, rows: Mapping[str, np.ndarray], num_shards: int = 1) -> ScoreIndex:
    """Write an index of `num_shards` shards, and open it."""
    for number in range(num_shards):
        write_shard(directory, manifest, rows, (number, num_shards))
    return ScoreIndex.open([str(directory)])


def files_in(directory: Path) -> dict[str, bytes]:
    """Content of every file below a directory, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def write_columns(directory: Path, manifest: IndexManifest, num_shards: int = 1, **columns: np.ndarray) -> ScoreIndex:
    """Write an index that has only these columns, and open it."""
    bounds = [manifest.num_samples * number // num_shards for number in range(num_shards + 1)]
    shards = []
    for first, end in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
        path = directory / f"samples-{first:015d}-{end:015d}"
        path.mkdir(parents=True)
        for name, values in columns.items():
            (path / f"{name}.npy").write_bytes(npy_header(values.dtype, end - first) + values[first:end].tobytes())
        shards.append(Shard(path, first, end, {}))
    return ScoreIndex(manifest, tuple(shards), "--scores")


MANIFEST = manifest_of([45, 1, 57])
"""103 samples in 13 blocks, the last of 7."""
ROWS = random_rows(MANIFEST)


def write_ids(
    prefix: object,
    data_path: Sequence[str],
    seq_length: int,
    ids: Sequence[int],
    valid_share: float = 0.0,
    teacher: str = "sha256:0",
) -> str:
    """Write PREFIX.npy and PREFIX.json for byte-level data; returns PREFIX.npy. teacher: fingerprint of the one that scored."""
    datasets = tuple(DatasetFacts(one, fingerprint(one), len(Windows(TokenFile.open(one), seq_length))) for one in data_path)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    scores = IndexManifest(
        datasets=datasets,
        seq_length=seq_length,
        vocabulary=tokenizer.vocabulary_size,
        tokenizer=tokenizer.fingerprint,
        teacher=teacher,
        teacher_step=10,
        teacher_directory="teacher/iter_0000010",
        top_k=(10,),
        masking={},
        dtype="float32",
        micro_batch_size=1,
        block_samples=1,
    )
    write_selection(
        str(prefix),
        [np.array(sorted(ids), np.int64)],
        num_selected=len(ids),
        scores=scores,
        rule={"rule": "by hand"},
        valid_share=valid_share,
    )
    return f"{prefix}.npy"


def write_scored_datasets(tmp_path: Path) -> Path:
    """Write two byte-level datasets of 20 and 11 windows, and their index. Default scores are 0.0, 0.1, ... by id, others random."""
    windows = []
    for name, text in (("cats", TEXTS[0][:320]), ("code", TEXTS[1][:176])):
        writer = IndexedWriter(str(tmp_path / name), np.dtype(np.uint16))
        tokens = np.append(np.frombuffer(text.encode(), np.uint8).astype(np.uint16), BYTES.eod)
        writer.append(tokens.astype(np.uint16), np.array([len(tokens)], np.int32))
        writer.finish()
        BYTES.save(tokenizer_directory(str(tmp_path / name)))
        windows.append(Windows(TokenFile.open(str(tmp_path / name)), LENGTH))
    datasets = tuple(DatasetFacts(one.file.prefix, fingerprint(one.file.prefix), len(one)) for one in windows)
    manifest = manifest_of([1], datasets=datasets, tokenizer=BYTES.fingerprint, teacher_directory=str(tmp_path / "gone"))
    tokens = np.concatenate([one.read_many(np.arange(len(one))) for one in windows])
    tokens[25] = tokens[3]
    rows = random_rows(manifest, median_dropped_10=np.arange(len(tokens)) / 10, content=content_hashes(tokens))
    write_index(tmp_path / "scores", manifest, rows, num_shards=2)
    assert [dataset.samples for dataset in datasets] == [20, 11]
    return tmp_path / "scores"


def select(index: Path, *words: object) -> int:
    return run_tool(
        SelectConfig, select_data, ["--scores", str(index), "--output", str(index.parent / "chosen"), *map(str, words)]
    )


def chosen(index: Path) -> list[int]:
    return Selection.open(str(index.parent / "chosen")).ids.tolist()


def report_of(index: Path) -> str:
    return (index.parent / "chosen.txt").read_text()
