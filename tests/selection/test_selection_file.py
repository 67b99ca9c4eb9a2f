"""A selection reads back as it was written, opens at once, and is refused where it is damaged or of other data."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.manifest import DatasetFacts, sampled_hash
from megatron_salt.errors import UserError
from megatron_salt.selection.score_format import npy_header
from megatron_salt.selection.selection_file import Selection, refuse_other_data, selection_paths, write_selection
from tests.support.datasets import bytes_read
from tests.support.selections import manifest_of

SCORES = manifest_of([1000, 1, 2000])
RULE = {"score": "median_zeroed_10", "name": "top", "fraction": 0.25, "maximum": None}
IDS = np.unique(np.random.default_rng(0).integers(0, 3001, 700))


def write(prefix: Path, ids: np.ndarray = IDS, pieces: int = 3, **facts: object) -> Selection:
    chunks = np.array_split(ids, pieces)
    write_selection(
        str(prefix), chunks, num_selected=len(ids), scores=dataclasses.replace(SCORES, **facts), rule=RULE, valid_share=0.01
    )
    return Selection.open(str(prefix))


@pytest.mark.parametrize("pieces", [1, 5, 900])
def test_a_selection_reads_back_as_written(tmp_path: Path, pieces: int) -> None:
    write(tmp_path / "a", pieces=pieces)
    for name in ("a", "a.npy", "a.json"):
        selection = Selection.open(str(tmp_path / name))
        assert isinstance(selection.ids, np.memmap) and selection.ids.dtype == np.uint32
        assert np.array_equal(selection.ids, IDS) and np.array_equal(np.load(tmp_path / "a.npy"), IDS)
        assert (selection.path, selection.manifest.scores, selection.manifest.rule) == (tmp_path / "a.npy", SCORES, RULE)
        assert (selection.manifest.num_samples, selection.manifest.num_selected) == (3001, len(IDS))
        selection.verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npy"]


def test_the_format_before_ties_were_recorded_is_read_and_draws_the_same(tmp_path: Path) -> None:
    now = write(tmp_path / "a")
    path = tmp_path / "a.json"
    raw = json.loads(path.read_text())
    assert (raw["format"], raw.pop("tie_seed"), raw.pop("tie_share")) == (2, None, 0.0)
    path.write_text(json.dumps({**raw, "format": 1}))
    before = Selection.open(str(tmp_path / "a"))
    assert before.fingerprint == now.fingerprint and np.array_equal(before.ids, now.ids)
    assert before.manifest == dataclasses.replace(now.manifest, tie_share=None)
    path.write_text(json.dumps(raw))  # format 2 must say
    with pytest.raises(UserError, match="tie_seed"):
        Selection.open(str(tmp_path / "a"))


def test_a_selection_from_a_part_of_the_samples_says_so(tmp_path: Path) -> None:
    selection = write(tmp_path / "a", sample=0.5, sample_seed=3)
    assert selection.manifest.scores == dataclasses.replace(SCORES, sample=0.5, sample_seed=3)
    refuse_other_data(selection, SCORES.datasets, 16, "t")  # the ids number all samples
    assert {"sample", "sample_seed"} <= set(json.loads((tmp_path / "a.json").read_text())["scores"])
    write(tmp_path / "b")
    assert not {"sample", "sample_seed"} & set(json.loads((tmp_path / "b.json").read_text())["scores"])


@pytest.mark.parametrize("num_samples, dtype", [((1 << 32), "uint32"), ((1 << 32) + 1, "int64")])
def test_ids_are_as_narrow_as_the_data_allows(tmp_path: Path, num_samples: int, dtype: str) -> None:
    ids = np.array([0, 5, 1 << 31, num_samples - 1])
    selection = write(tmp_path / "a", ids, datasets=(DatasetFacts("d", "f", num_samples),))
    assert selection.ids.dtype == selection.manifest.dtype == dtype and selection.ids.tolist() == ids.tolist()
    assert selection.between(6, num_samples) == slice(2, 4) and selection.between(num_samples - 1, num_samples) == slice(3, 4)


def test_between_is_what_a_mask_says(tmp_path: Path) -> None:
    selection = write(tmp_path / "a")
    for first, end in ((0, 3001), (0, 0), (17, 17), (5, 6), (1000, 1001), (1001, 3001), (2999, 10**12)):
        assert np.array_equal(selection.ids[selection.between(first, end)], IDS[(first <= IDS) & (end > IDS)])


def test_the_fingerprint_names_the_ids(tmp_path: Path) -> None:
    fingerprints = [write(tmp_path / name, ids).fingerprint for name, ids in (("a", IDS), ("b", IDS), ("c", IDS[1:]))]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2] and fingerprints[0].startswith("selection:")


def test_opening_costs_the_same_at_any_size(tmp_path: Path) -> None:
    """A hundred million ids, in a sparse file."""
    selection = write(tmp_path / "a", np.arange(3000))
    raw = json.loads((tmp_path / "a.json").read_text())
    num = 10**8
    os.truncate(tmp_path / "a.npy", 128 + 4 * num)
    with open(tmp_path / "a.npy", "r+b") as stream:
        stream.write(npy_header(np.dtype(np.uint32), num))
    raw |= {"num_selected": num, "npy_bytes": 128 + 4 * num, "sampled": sampled_hash(tmp_path / "a.npy")}
    (tmp_path / "a.json").write_text(json.dumps(raw))
    tracemalloc.start()
    before, started = bytes_read(), time.monotonic()
    selection = Selection.open(str(tmp_path / "a"))
    assert len(selection.ids) == num and selection.between(0, 1) and selection.ids[num - 1] == 0
    seconds, cost = time.monotonic() - started, bytes_read() - before
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1.0 and cost < 1 << 20 and peak < 1 << 20


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    before = write(tmp_path / "a").fingerprint

    def failing() -> object:
        yield IDS[:10]
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_selection(str(tmp_path / "a"), failing(), num_selected=20, scores=SCORES, rule=RULE, valid_share=0.0)
    with pytest.raises(AssertionError):
        write_selection(str(tmp_path / "a"), [IDS], num_selected=len(IDS) - 1, scores=SCORES, rule=RULE, valid_share=0.0)
    with pytest.raises(AssertionError, match="ascend"):
        write_selection(
            str(tmp_path / "a"), [IDS[5:], IDS[:5]], num_selected=len(IDS), scores=SCORES, rule=RULE, valid_share=0.0
        )
    assert Selection.open(str(tmp_path / "a")).fingerprint == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npy"]


def test_the_description_goes_first_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever moment a kill comes, PREFIX.json never stands beside the ids of another selection."""
    write(tmp_path / "a")
    calls: list[str] = []
    unlink, replace = os.unlink, os.replace
    monkeypatch.setattr(
        os, "unlink", lambda path, **rest: (calls.append(f"delete {os.path.basename(path)}"), unlink(path, **rest))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(f"rename {os.path.basename(old)}"), replace(old, new)))
    write_selection(str(tmp_path / "a"), [IDS], num_selected=len(IDS), scores=SCORES, rule=RULE, valid_share=0.0)
    assert calls == ["rename a.json.tmp.tmp", "delete a.json", "rename a.npy.tmp", "rename a.json.tmp"]


def test_paths_of_a_prefix() -> None:
    for name in ("x/top.half", "x/top.half.npy", "x/top.half.json"):
        assert selection_paths(name) == (Path("x/top.half.npy"), Path("x/top.half.json"))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_missing_file_is_named_with_the_flag(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a")
    (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(UserError, match=f"--stage1-selection .*a: .*a{suffix} does not exist"):
        Selection.open(str(tmp_path / "a"))
    with pytest.raises(UserError, match="--other-flag"):
        Selection.open(str(tmp_path / "a"), "--other-flag")


@pytest.mark.parametrize("change, how", [(-4, "truncated"), (4, "longer")])
def test_a_file_of_another_size_is_refused(tmp_path: Path, change: int, how: str) -> None:
    write(tmp_path / "a")
    size = (tmp_path / "a.npy").stat().st_size
    os.truncate(tmp_path / "a.npy", size + change)
    with pytest.raises(UserError, match=rf"a\.npy is {how}.* {size + change} bytes, .*a\.json says {size}"):
        Selection.open(str(tmp_path / "a"))


@pytest.mark.parametrize("offset", [0, 60, 128, 1500, -1])
def test_a_changed_byte_of_a_small_file_is_refused(tmp_path: Path, offset: int) -> None:
    write(tmp_path / "a")
    content = bytearray((tmp_path / "a.npy").read_bytes())
    content[offset] ^= 1
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npy is not the file that .*a\.json describes"):
        Selection.open(str(tmp_path / "a"))


def test_a_change_between_the_sampled_blocks_is_found_by_verify(tmp_path: Path) -> None:
    selection = write(tmp_path / "a", np.arange(10**6), datasets=(DatasetFacts("d", "f", 10**6),))
    with open(selection.path, "r+b") as stream:
        stream.seek(6000)
        stream.write(b"\xff\xff\xff\xff")
    with pytest.raises(UserError, match=r"--stage1-selection: .*a\.npy has content hash"):
        Selection.open(str(tmp_path / "a")).verify()


@pytest.mark.parametrize(
    "values, word",
    [({"format": 9}, "format 9"), ({"extra": 1}, "extra"), ({"num_selected": "x"}, "num_selected"), ({"num_selected": 3}, r"\(3,\)"),
     ({"dtype": "int64"}, "says int64"), ({"scores": {}}, "fields missing"), ({"scores": 5}, "scores should be IndexManifest")],
)  # fmt: skip
def test_a_damaged_description_is_refused(tmp_path: Path, values: dict, word: str) -> None:
    write(tmp_path / "a")
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(UserError, match=rf"(?s)a\.json.*{word}"):
        Selection.open(str(tmp_path / "a"))
    path.write_text("{")
    with pytest.raises(UserError, match=r"a\.json is not a readable manifest"):
        Selection.open(str(tmp_path / "a"))


def test_other_data_is_refused_by_what_differs(tmp_path: Path) -> None:
    selection = write(tmp_path / "a")
    first, second, third = SCORES.datasets
    same = [dataclasses.replace(dataset, prefix=f"moved/{dataset.prefix}") for dataset in SCORES.datasets]
    refuse_other_data(selection, same, 16, "t")
    for datasets, seq_length, tokenizer, told in (
        (same, 32, "t", "--seq-length is 16 there and 32 here"),
        (same, 16, "u", "the tokenizer is t there and u here"),
        ([second, first, third], 16, "t", "samples of dataset 1, d1, is 1000 there and 1 here"),
        ([first, third], 16, "t", "dataset 3, d2, is there alone"),
        ([*same, DatasetFacts("more", "f", 5)], 16, "t", "dataset 4, more, is here alone"),
        (
            [first, DatasetFacts("x", "content:9", 1), third],
            16,
            "t",
            "fingerprint of dataset 2, x, is content:1 there and content:9 here",
        ),
    ):
        with pytest.raises(UserError, match=rf"--stage1-selection .*a\.npy was chosen from other samples.*{told}"):
            refuse_other_data(selection, datasets, seq_length, tokenizer)
