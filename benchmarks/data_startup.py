"""Start-up time and batches a second of our data path against megatron-core's GPTDataset, on the same files.

    python benchmarks/data_startup.py          about a minute; needs 2 GB of disk, and as much memory for megatron-core's indices

Both run in one process without workers, on files in the page cache, and take turns. With 10^5 samples documents are like
text (1,000 tokens on average). With 10^8 and 10^9 samples the files have holes and a few long documents, which is the easiest
case for an index. For 10^9 samples megatron-core's cost is ten times the one measured at 10^8.
"""

from __future__ import annotations

import logging
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from results import result

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: see there)

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_salt.config import DataConfig
from megatron_salt.data.batch import Batches
from megatron_salt.data.indexed_dataset import HEADER, MAGIC, VERSION
from megatron_salt.data.samples import Samples, open_training_data

VOCABULARY, EOD, SEED = 32_000, 0, 1234
BATCH = 64


class Tokenizer:
    """The attributes of a tokenizer that GPTDataset reads."""

    eod, pad, pad_id, vocab_size = EOD, VOCABULARY, VOCABULARY, VOCABULARY
    unique_identifiers: ClassVar = {"class": "Tokenizer", "vocabulary": VOCABULARY}


@dataclass(frozen=True)
class Corpus:
    prefix: str
    seq_length: int
    num_samples: int
    resets: bool = False
    """Loss mask and positions depend on document ends."""


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        text = Corpus(write_text(f"{folder}/text", seq_length=512, num_samples=10**5), 512, 10**5)
        marked = Corpus(text.prefix, text.seq_length, text.num_samples, resets=True)
        large = Corpus(write_sparse(f"{folder}/large", 64 * 10**8 + 1, num_documents=64), 64, 10**8)
        huge = Corpus(write_sparse(f"{folder}/huge", 64 * 10**9 + 1, num_documents=640), 64, 10**9)

        print(f"{'':34}{'megatron-core':>16}{'ours':>12}{'ratio':>10}")
        speed, speed_marked = compare_speed("plain", text), compare_speed("document masks", marked)
        start_text, start_large = compare_start(text, f"{folder}/cache"), compare_start(large, f"{folder}/cache")
        huge_s = open_huge(huge)
        torch.distributed.destroy_process_group()
    result("batches_per_s_over_mcore", speed, 1.0)
    result("batches_per_s_over_mcore_document_masks", speed_marked, 1.0)
    result("startup_1e5_over_mcore_first", start_text.ratio, 1.0)
    result("startup_1e8_over_mcore_first", start_large.ratio, 1.0)
    result("startup_1e8_s", start_large.ours_s, 1.0, lower_is_better=True)
    result("open_1e9_and_find_last_s", huge_s, 1.0, lower_is_better=True)


def compare_speed(title: str, corpus: Corpus) -> float:
    """Batches of BATCH samples a second: ours divided by megatron-core's."""
    theirs, ours = (
        open_theirs(corpus, None),
        Batches(open_ours(corpus), global_batch_size=BATCH, micro_batch_size=BATCH, replica=0, num_replicas=1),
    )
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    rounds, batches = 8, 10
    for turn in range(rounds):
        first = turn * batches * BATCH
        seconds["theirs"].append(timed(lambda first=first: [their_batch(theirs, first + b * BATCH) for b in range(batches)]))
        seconds["ours"].append(timed(lambda first=first: [ours.fetch(first + b * BATCH) for b in range(batches)]))
    their_s, our_s = (statistics.median(seconds[who]) / batches for who in ("theirs", "ours"))
    print(f"{'us a sample, ' + title:34}{their_s / BATCH * 1e6:16.2f}{our_s / BATCH * 1e6:12.2f}{their_s / our_s:9.1f}x")
    print(f"{'batches of ' + str(BATCH) + ' a second, ' + title:34}{1 / their_s:16.0f}{1 / our_s:12.0f}{their_s / our_s:9.1f}x")
    return their_s / our_s


@dataclass(frozen=True)
class Start:
    ratio: float
    ours_s: float


def compare_start(corpus: Corpus, cache: str) -> Start:
    """Seconds from the path to the first batch. Theirs: the first time (indices are built), and later (indices exist)."""
    first_s = timed(lambda: their_batch(open_theirs(corpus, cache), 0))
    later_s = timed(lambda: their_batch(open_theirs(corpus, cache), 0))
    index_mb = sum(file.stat().st_size for file in Path(cache).iterdir()) / 1e6
    for file in Path(cache).iterdir():
        file.unlink()
    ours_s = statistics.median(timed(lambda: first_batch(corpus)) for _ in range(5))
    name = f"{corpus.num_samples:.0e} samples".replace("e+0", "e")
    print(f"{'first start, s, ' + name:34}{first_s:16.3f}{ours_s:12.4f}{first_s / ours_s:9.1f}x")
    print(f"{'later start, s, ' + name:34}{later_s:16.3f}{ours_s:12.4f}{later_s / ours_s:9.1f}x")
    print(f"{'index on disk, MB, ' + name:34}{index_mb:16.1f}{0:12}")
    if corpus.num_samples == 10**8:
        print(
            f"{'first start, s, 1e9 samples':34}{'~' + format(10 * first_s, '.0f'):>16}   (ten times the 1e8 figure; "
            f"~{10 * index_mb / 1e3:.0f} GB of indices)"
        )
    return Start(first_s / ours_s, ours_s)


def open_huge(corpus: Corpus) -> float:
    """Seconds to open 10^9 windows, compute their name, and read the last one of the files and the last one of the order."""

    def find() -> None:
        samples = open_ours(corpus)
        assert len(samples) == corpus.num_samples and samples.fingerprint
        last = samples.tokens(np.array([corpus.num_samples - 1]))
        assert last[0, -1] == 7, last
        Batches(samples, global_batch_size=1, micro_batch_size=1, replica=0, num_replicas=1).fetch(corpus.num_samples - 1)

    seconds = statistics.median(timed(find) for _ in range(5))
    print(f"{'open and find the last, s, 1e9':34}{'':16}{seconds:12.4f}")
    return seconds


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def open_ours(corpus: Corpus) -> Samples:
    data = DataConfig(data_path=(corpus.prefix,), eod_mask_loss=corpus.resets, reset_position_ids=corpus.resets)
    return open_training_data(data, corpus.seq_length, SEED, VOCABULARY, EOD)[0]


def first_batch(corpus: Corpus) -> None:
    samples = open_ours(corpus)
    assert samples.fingerprint
    Batches(samples, global_batch_size=BATCH, micro_batch_size=BATCH, replica=0, num_replicas=1).fetch(0)


def open_theirs(corpus: Corpus, cache: str | None) -> GPTDataset:
    """A training split of one epoch, as BlendedMegatronDatasetBuilder makes it for one dataset."""
    with tempfile.TemporaryDirectory() as folder:
        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=corpus.seq_length,
            blend=([corpus.prefix], None),
            split="1,0,0",
            path_to_cache=cache or folder,
            tokenizer=Tokenizer(),
            reset_position_ids=corpus.resets,
            reset_attention_mask=False,
            eod_mask_loss=corpus.resets,
            create_attention_mask=False,
        )
        indexed = IndexedDataset(corpus.prefix, multimodal=False, mmap=True)
        documents = np.arange(indexed.sequence_lengths.shape[0], dtype=np.int32)
        return GPTDataset(indexed, corpus.prefix, documents, corpus.num_samples, Split.train, config)


def their_batch(dataset: GPTDataset, first: int) -> dict[str, torch.Tensor]:
    samples = [dataset[index] for index in range(first, first + BATCH)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def write_text(prefix: str, seq_length: int, num_samples: int) -> str:
    """Write random tokens in documents of 20 to 2,000 tokens, each ended by EOD."""
    random, left = np.random.default_rng(0), seq_length * num_samples + 1
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    while left:
        length = min(left, int(random.integers(20, 2000)))
        tokens = random.integers(1, VOCABULARY, length)
        tokens[-1] = EOD
        builder.add_item(torch.from_numpy(tokens))
        builder.end_document()
        left -= length
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_sparse(prefix: str, num_tokens: int, num_documents: int) -> str:
    """Write zeros (holes on disk) in documents of equal length. The last token is 7."""
    lengths = np.full(num_documents, num_tokens // num_documents, np.int64)
    lengths[-1] += num_tokens - lengths.sum()
    with open(f"{prefix}.idx", "wb") as idx:
        idx.write(HEADER.pack(MAGIC, VERSION, 8, num_documents, num_documents + 1))
        idx.write(lengths.astype(np.int32).tobytes())
        idx.write((2 * (np.cumsum(lengths) - lengths)).tobytes())
        idx.write(np.arange(num_documents + 1, dtype=np.int64).tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        os.truncate(file.fileno(), 2 * (num_tokens - 1))
        file.seek(2 * (num_tokens - 1))
        file.write(struct.pack("<H", 7))
    return prefix


if __name__ == "__main__":
    main()
