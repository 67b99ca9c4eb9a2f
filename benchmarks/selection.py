"""Choosing samples from scores at 10^8 and 10^9 samples: exact selection, the search for duplicates, and opening the result.

    python benchmarks/selection.py           10^8 samples: half a minute, 3 GB of disk
    python benchmarks/selection.py --full    10^9 too: five minutes, 14 GB of disk

The rival is numpy in memory: argpartition for the highest tenth of float32 scores, and a sort of the resulting ids, where that fits (10^8).
Both read the same column file and give the same ids. Each runs in its own process: seconds are CPU seconds, memory is the peak RSS minus
the RSS before. Scores are random; one sample in 1000 repeats the contents of another. A last selection uses a column of equal scores, so
that only ties decide.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from results import result

from megatron_salt.data.manifest import DatasetFacts
from megatron_salt.selection.eligibility import duplicates, find_eligible
from megatron_salt.selection.rules import Rule, choose
from megatron_salt.selection.score_format import IndexManifest, claim, columns, npy_header, write_shard_manifest
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.selection.selection_file import Selection, write_selection

SCORE, CHUNK, FRACTION = "median_zeroed_10", 1 << 22, 0.1
GOAL_GIB = 2.0
GOAL_OVER_ARGPARTITION = 2.0  # seconds
EQUAL, GOAL_EQUAL = "median", 1.5  # a column of equal scores; seconds of choosing by it over those by SCORE
DUPLICATES_GIB = 1.5


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--full", action="store_true")
    asked.add_argument("--samples", type=int, nargs="+", help="default: 10^8, with --full 10^9 too")
    asked.add_argument("--directory", help="where the scores are written for the time of the run; default: the system's")
    asked.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    flags = asked.parse_args()
    if flags.child:
        print(json.dumps(CHILDREN[flags.child[0]](Path(flags.child[1]))))
        return
    for num_samples in flags.samples or ([10**8, 10**9] if flags.full else [10**8]):
        with tempfile.TemporaryDirectory(dir=flags.directory) as name:
            measure(Path(name), num_samples)


def measure(folder: Path, num_samples: int) -> None:
    """A table and RESULT lines for one size."""
    write_scores(folder, num_samples)
    size = f"1e{len(str(num_samples)) - 1}"
    told = {name: in_child(name, folder) for name in ("select", "equal", "duplicates", "open")}
    if num_samples <= 2 * 10**8:
        told["argpartition"] = in_child("argpartition", folder)
        assert told["argpartition"]["ids"] == told["select"]["ids"], "not the same ids"
    print(f"{size} samples, the highest {FRACTION:.0%}")
    for name, figures in told.items():
        print(f"  {name:14}{figures['seconds']:>10.3f} s{figures['gib']:>10.3f} GiB")
    result(f"peak_gib_selecting_{size}", told["select"]["gib"], GOAL_GIB, lower_is_better=True)
    over_equal = told["equal"]["seconds"] / told["select"]["seconds"]
    result(f"seconds_all_equal_over_selecting_{size}", over_equal, GOAL_EQUAL, lower_is_better=True)
    result(f"peak_gib_duplicates_{size}", told["duplicates"]["gib"], GOAL_GIB, lower_is_better=True)
    if "argpartition" in told:
        over = {what: told["select"][what] / told["argpartition"][what] for what in ("seconds", "gib")}
        result(f"seconds_selecting_over_argpartition_{size}", over["seconds"], GOAL_OVER_ARGPARTITION, lower_is_better=True)
        result(f"gib_selecting_over_argpartition_{size}", over["gib"], 0.25, lower_is_better=True)
    result(f"milliseconds_to_open_index_and_selection_{size}", 1e3 * told["open"]["seconds"], 100, lower_is_better=True)
    result(f"microseconds_a_position_{size}", told["open"]["microseconds"], 10, lower_is_better=True)


def write_scores(folder: Path, num_samples: int) -> None:
    """Write an index with the three columns that a selection reads, in the form of `score_data.py`."""
    dataset = DatasetFacts("synthetic", "content:0", num_samples)
    manifest = IndexManifest(
        datasets=(dataset,),
        seq_length=1024,
        vocabulary=50000,
        tokenizer="t",
        teacher="w",
        teacher_step=1,
        teacher_directory="runs/t",
        top_k=(10,),
        masking={},
        dtype="float32",
        micro_batch_size=8,
        block_samples=4096,
    )
    claim(folder / "scores", manifest)
    shard = folder / "scores" / f"samples-{0:015d}-{num_samples:015d}"
    shard.mkdir()
    kinds, random = columns(manifest.top_k, manifest.seq_length), np.random.default_rng(0)
    for name in (SCORE, "tokens", "content"):
        with open(shard / f"{name}.npy", "wb") as stream:
            stream.write(npy_header(kinds[name], num_samples))
            for first in range(0, num_samples, CHUNK):
                count = min(CHUNK, num_samples - first)
                stream.write(chunk_of(name, first, count, random).astype(kinds[name]).tobytes())
    for name in set(kinds) - {SCORE, "tokens", "content"}:  # holes of the right size, which read as zeros
        with open(shard / f"{name}.npy", "wb") as stream:
            stream.write(npy_header(kinds[name], num_samples))
            stream.truncate(len(npy_header(kinds[name], num_samples)) + num_samples * kinds[name].itemsize)
    write_shard_manifest(shard, manifest, 0, num_samples, dict.fromkeys(kinds, ""))


def chunk_of(name: str, first: int, count: int, random: np.random.Generator) -> np.ndarray:
    if name == SCORE:
        return random.standard_gamma(2.0, count, np.float32)
    if name == "tokens":
        return np.full(count, 1024)
    hashes = random.integers(0, 1 << 64, count, np.uint64)
    hashes[999::1000] = hashes[0::1000][: len(hashes[999::1000])]
    return hashes


# --- in a process of its own ------------------------------------------------------------------------------------------


def in_child(name: str, folder: Path) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, str(folder)], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def measured(action) -> tuple[float, float, object]:
    """(CPU seconds, GiB of peak RSS minus the RSS before, result of the action)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory_line("VmRSS"), time.process_time()
    returned = action()
    return time.process_time() - start, (memory_line("VmHWM") - before) / 2**20, returned


def memory_line(name: str) -> int:
    """KiB."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])


def choose_and_write(folder: Path, column: str, output: str) -> int:
    index = ScoreIndex.open([str(folder / "scores")])
    choice = choose(index, column, Rule("top", fraction=FRACTION), find_eligible(index, 0.0, None))
    write_selection(
        str(folder / output),
        choice.ids(),
        num_selected=choice.count,
        scores=index.manifest,
        rule={},
        valid_share=0.0,
    )
    return choice.count


def select(folder: Path) -> dict:
    seconds, gib, _ = measured(lambda: choose_and_write(folder, SCORE, "chosen"))
    return {"seconds": seconds, "gib": gib, "ids": digest(folder, Selection.open(str(folder / "chosen")).ids)}


def select_among_equals(folder: Path) -> dict:
    seconds, gib, _ = measured(lambda: choose_and_write(folder, EQUAL, "equal"))
    return {"seconds": seconds, "gib": gib}


def argpartition(folder: Path) -> dict:
    def run() -> np.ndarray:
        scores = np.load(next((folder / "scores").glob(f"samples-*/{SCORE}.npy")))
        count = int(len(scores) * FRACTION)
        ids = np.argpartition(scores, len(scores) - count)[len(scores) - count :]
        ids.sort()
        return ids

    seconds, gib, ids = measured(run)
    assert isinstance(ids, np.ndarray)
    return {"seconds": seconds, "gib": gib, "ids": digest(folder, ids)}


def digest(folder: Path, ids: np.ndarray) -> list[float]:
    """A digest of a choice that is equal for choices that differ only in ties at the cut, of which argpartition takes any.

    It has the number of samples, the lowest score, the number above it, and the sum of their ids.
    """
    scores = np.load(next((folder / "scores").glob(f"samples-*/{SCORE}.npy")), mmap_mode="r")[ids]
    above = ids[scores > scores.min()]
    return [len(ids), float(scores.min()), len(above), int(above.sum(dtype=np.int64))]


def find_duplicates(folder: Path) -> dict:
    index = ScoreIndex.open([str(folder / "scores")])
    seconds, gib, packed = measured(lambda: duplicates(index, int(DUPLICATES_GIB * 2**30)))
    assert isinstance(packed, np.ndarray)
    found = int(np.unpackbits(packed).sum())
    expected = sum(min(CHUNK, index.num_samples - first) // 1000 for first in range(0, index.num_samples, CHUNK))
    assert found == expected, (found, expected)
    return {"seconds": seconds, "gib": gib}


def open_and_map(folder: Path) -> dict:
    def run() -> Selection:
        ScoreIndex.open([str(folder / "scores")])
        return Selection.open(str(folder / "chosen"))

    seconds, gib, selection = measured(run)
    assert isinstance(selection, Selection)
    positions = np.random.default_rng(1).integers(0, len(selection.ids), 100_000)
    start = time.perf_counter()
    for batch in positions.reshape(-1, 100):
        selection.ids[batch]
    return {"seconds": seconds, "gib": gib, "microseconds": 1e6 * (time.perf_counter() - start) / len(positions)}


CHILDREN = {
    "select": select,
    "equal": select_among_equals,
    "argpartition": argpartition,
    "duplicates": find_duplicates,
    "open": open_and_map,
}


if __name__ == "__main__":
    main()
