"""Score indices for tests, of any rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_salt.data.manifest import DatasetFacts
from megatron_salt.selection.score_format import IndexManifest, claim, columns, npy_header, shard_blocks
from megatron_salt.selection.score_reader import ScoreIndex, Shard
from megatron_salt.selection.score_writer import ShardWriter

TOP_K = (1, 10)


def manifest_of(sizes: Sequence[int], block_samples: int = 8, **facts: object) -> IndexManifest:
    """Of datasets `d0`, `d1`, ... with so many samples."""
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
    """Every column: those given, and other random numbers."""
    random = np.random.default_rng(seed)
    kinds = columns(manifest.top_k, manifest.seq_length)
    rows = {name: random.integers(1, 50, manifest.num_samples).astype(dtype) for name, dtype in kinds.items()}
    rows["content"] = random.permutation(manifest.num_samples).astype(np.uint64) << np.uint64(40)
    return rows | {name: values.astype(kinds[name]) for name, values in given.items()}


def write_blocks(writer: ShardWriter, manifest: IndexManifest, rows: Mapping[str, np.ndarray], blocks: Sequence[int]) -> None:
    """Write these blocks, as a scoring job does."""
    for block in blocks:
        here = slice(block * manifest.block_samples, (block + 1) * manifest.block_samples)
        writer.write(block, {name: values[here] for name, values in rows.items()})


def write_shard(directory: Path, manifest: IndexManifest, rows: Mapping[str, np.ndarray], shard: tuple[int, int]) -> Path:
    """What one job of an array does, from beginning to end, or from where another one stopped."""
    claim(directory, manifest)
    writer = ShardWriter(directory, manifest, shard_blocks(manifest.num_blocks, shard))
    write_blocks(writer, manifest, rows, list(writer.todo))
    writer.finish()
    return writer.path


def write_index(directory: Path, manifest: IndexManifest, rows: Mapping[str, np.ndarray], num_shards: int = 1) -> ScoreIndex:
    """An index of so many shards, opened."""
    for number in range(num_shards):
        write_shard(directory, manifest, rows, (number, num_shards))
    return ScoreIndex.open([str(directory)])


def files_in(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def write_columns(directory: Path, manifest: IndexManifest, num_shards: int = 1, **columns: np.ndarray) -> ScoreIndex:
    """An index of which only these columns can be read."""
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
