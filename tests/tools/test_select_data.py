"""select_data: what it writes is the rule's choice, and what it reports is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.selection.selection_file import Selection
from megatron_salt.selection.ties import TIE_SEED, tie_ranks
from tests.support.selections import (
    TEXTS,
    chosen,
    files_in,
    manifest_of,
    random_rows,
    report_of,
    select,
    write_index,
    write_scored_datasets,
)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return write_scored_datasets(tmp_path)


@pytest.mark.parametrize(
    "words, ids",
    [
        (("--fraction", 0.2), range(25, 31)),
        (("--num-samples", 4), range(27, 31)),
        (("--num-samples", 4, "--rule", "bottom"), range(4)),
        (("--num-samples", 4, "--rule", "band", "--band-skip", 0.1), range(24, 28)),
        (("--rule", "threshold", "--min-score", 1.05, "--max-score", 1.35), range(11, 14)),
        (("--fraction", 0.5, "--per-dataset"), [*range(10, 20), *range(25, 31)]),
        (("--num-samples", 6, "--exclude-duplicates"), [24, *range(26, 31)]),
        (("--num-samples", 6, "--valid-share", 0.2), range(23, 29)),
        (("--num-samples", 31, "--score", "median_zeroed_1"), range(31)),
    ],
)  # fmt: skip
def test_the_file_is_the_rules_choice(
    index: Path, words: tuple, ids: range | list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert select(index, *words) == 0
    assert chosen(index) == list(ids)
    assert report_of(index) in capsys.readouterr().out
    assert f"{len(ids)} of 31 samples" in report_of(index)
    assert (index.parent / "chosen.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("rule", ["top", "bottom", "random"])
def test_of_a_part_that_was_scored_the_choice_is_inside_it(tmp_path: Path, rule: str) -> None:
    """Oracle: a sort of the scored samples. A duplicate is left out only if both windows are scored."""
    manifest = manifest_of([60, 40], sample=0.4, sample_seed=9)
    scored = np.flatnonzero(manifest.scored(0, 100))
    scores = np.zeros(100)
    scores[scored] = np.random.default_rng(0).random(len(scored))
    rows = random_rows(manifest, median_dropped_10=scores)
    rows["content"][scored[3]] = rows["content"][scored[30]] = 5
    lost = np.setdiff1d(np.arange(100), scored)
    rows["content"][scored[4]] = 6
    for name in rows:
        rows[name][lost] = 0
    write_index(tmp_path / "scores", manifest, rows, num_shards=3)
    assert select(tmp_path / "scores", "--fraction", 0.5, "--rule", rule, "--exclude-duplicates", "--valid-share", 0.05) == 0
    held_out = np.array([57, 58, 59, 98, 99])
    eligible = np.setdiff1d(scored, [*held_out, scored[30]])
    count = int(len(eligible) / 2 + 0.5)
    ranked = sorted(eligible, key=lambda sample_id: scores[sample_id], reverse=rule == "top")
    assert len(chosen(tmp_path / "x")) == count and set(chosen(tmp_path / "x")) <= set(eligible)
    assert rule == "random" or chosen(tmp_path / "x") == sorted(ranked[:count])
    assert f"1 duplicates, {len(np.setdiff1d(lost, held_out))} were not scored;" in report_of(tmp_path / "x")


def test_a_random_choice_is_its_seeds(index: Path) -> None:
    found = []
    for words in ((), ("--seed", 1234), ("--seed", 2)):
        assert select(index, "--num-samples", 9, "--rule", "random", "--overwrite", *words) == 0
        found.append(chosen(index))
    assert found[0] == found[1] != found[2] and all(len(set(ids)) == 9 for ids in found)


def test_the_report_says_what_was_chosen(index: Path) -> None:
    assert select(index, "--fraction", 0.5, "--valid-share", 0.1, "--exclude-duplicates", "--examples", 2) == 0
    output = report_of(index)
    assert "chosen by score median_dropped_10, name top, fraction 0.5" in output and "step 7, w" in output
    assert "not eligible: 3 held out (--valid-share 0.1), 0 without a token that counts, 1 duplicates" in output
    lines = [line.split() for line in output.splitlines() if line.endswith(("cats", "code"))]
    assert [(line[0], line[1], line[2], line[4]) for line in lines[:2]] == [("20", "18", "5", "1.3"), ("11", "9", "9", "1.3")]
    assert sum(int(count) for count in re.findall(r"^ +[\d.]+ [|>][#.]* (\d+) of \d+$", output, re.MULTILINE)) == 14
    assert re.search(r"%  median_zeroed_1$", output, re.MULTILINE) and "by chance 51.9%" in output
    best = output.partition("highest scores:")[2].splitlines()
    assert "sample 29 " in best[1] and "2.9, chosen:" in best[1] and "sys.path" in best[1] + best[2]
    assert "sample 12 " in output.partition("not chosen, next to the cut:")[2].splitlines()[1]
    assert "sample 0 " in output.partition("lowest scores:")[2]


@pytest.mark.parametrize("rule, skip", [("top", 0), ("bottom", 0), ("band", 6)])
def test_the_overlap_is_that_of_two_sorts(index: Path, rule: str, skip: int) -> None:
    """Oracle: sort the samples by each score, ties by rank, and take seven."""
    assert select(index, "--num-samples", 7, "--rule", rule, *(("--band-skip", 0.2) if skip else ())) == 0
    opened = ScoreIndex.open([str(index)])
    overlaps = {name: share for share, name in re.findall(r"^ +([\d.]+%)  (\w+)$", report_of(index), re.MULTILINE)}
    assert len(overlaps) == 12 and "median_dropped_10" not in overlaps
    for name, share in overlaps.items():
        scores = opened.read(name, 0, 31)
        taken = set(
            np.lexsort((tie_ranks(np.arange(31), TIE_SEED), scores if rule == "bottom" else -scores))[skip : skip + 7].tolist()
        )
        assert share == f"{len(taken & set(chosen(index))) / 7:.1%}", name


def test_ties_at_the_cut_are_told(index: Path, tmp_path: Path) -> None:
    """All scores but three are 0, so the seeded order of ties chooses five samples."""
    opened = manifest_of([40])
    write_index(tmp_path / "flat", opened, random_rows(opened, median_zeroed_10=np.arange(40) // 37))
    for words, seed in (((), TIE_SEED), (("--tie-seed", 5), 5)):
        flags = ("--score", "median_zeroed_10", "--num-samples", 8, "--overwrite", "--allow-ties")
        assert select(tmp_path / "flat", *flags, *words) == 0
        assert chosen(index) == [*sorted(np.argsort(tie_ranks(np.arange(37), seed))[:5].tolist()), 37, 38, 39]
        manifest = Selection.open(str(index.parent / "chosen")).manifest
        assert (manifest.tie_seed, manifest.tie_share) == (seed, 5 / 8)
    output = report_of(index)
    assert (
        "5 of the 8 chosen ones, 62.50%, have the very score of a cut, as others have that were not chosen: --tie-seed 5 decided"
        in output
    )
    assert "a zeroed median is 0 where half of the tokens or more are outside the top k" in output
    assert "d0.idx is not there" in output


@pytest.mark.parametrize("per_dataset", [False, True])
@pytest.mark.parametrize("rule, skip", [("top", 0.0), ("bottom", 0.0), ("band", 0.2)])
def test_a_score_that_does_not_tell_samples_apart_is_refused_and_those_that_do_are_named(
    tmp_path: Path, rule: str, skip: float, per_dataset: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the tie share that the tool records when it chooses by each of the other scores."""
    opened = manifest_of([60, 40])
    rows = random_rows(
        opened, median_dropped_10=np.zeros(100), mean=np.random.default_rng(1).random(100), entropy=np.arange(100) // 7
    )
    write_index(tmp_path / "flat", opened, rows)
    flags = [
        "--fraction",
        0.5,
        "--rule",
        rule,
        *(["--band-skip", skip] if skip else []),
        *(["--per-dataset"] if per_dataset else []),
    ]
    before = files_in(tmp_path)
    assert select(tmp_path / "flat", *flags) == 2
    output = capsys.readouterr().err
    assert "--score median_dropped_10 does not tell the samples apart: 50 of the 50 that would be chosen, 100.0%," in output
    assert output.count("\n") == 1 and "or --allow-ties" in output and files_in(tmp_path) == before
    named = dict(re.findall(r"(\w+) \(([\d.]+%)\)", output))
    shares = {}
    for name, dtype in ScoreIndex.open([str(tmp_path / "flat")]).columns.items():
        if dtype.kind == "f":
            assert select(tmp_path / "flat", *flags, "--allow-ties", "--overwrite", "--score", name, "--examples", 0) == 0
            shares[name] = Selection.open(str(tmp_path / "chosen")).manifest.tie_share or 0.0
    assert named == {name: f"{share:.1%}" for name, share in shares.items() if share <= 0.05} and named["mean"] == "0.0%"
    assert len(named) < len(shares) and "entropy" in shares
    capsys.readouterr()


def test_up_to_a_twentieth_may_be_decided_by_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = manifest_of([100])
    for tied, status in ((1, 0), (2, 0), (3, 2)):
        scores = np.arange(100.0)
        scores[57 : 60 + tied] = 58  # 40 are chosen, and of these `tied` by their order
        write_index(tmp_path / f"{tied}" / "scores", opened, random_rows(opened, median_dropped_10=scores))
        assert select(tmp_path / f"{tied}" / "scores", "--num-samples", 40) == status
    assert "3 of the 40 that would be chosen, 7.5%" in capsys.readouterr().err


def test_chosen_documents_are_exported_as_text(index: Path) -> None:
    path = index.parent / "out" / "chosen.jsonl"
    assert select(index, "--num-samples", 3, "--export-documents", path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [28, 29, 30] and [row["window"] for row in rows] == [8, 9, 10]
    assert [row["text"] for row in rows] == [TEXTS[1][16 * window : 16 * window + 16] for window in (8, 9, 10)]
    assert all(row["dataset"].endswith("code") for row in rows) and rows[0]["median_dropped_10"] == pytest.approx(2.8)


def test_data_that_moved_is_found_and_other_data_refused(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = index.parent
    for name in ("cats", "code"):
        for suffix in (".bin", ".idx", ".tokenizer"):
            (folder / (name + suffix)).rename(folder / f"moved-{name}{suffix}")
    assert select(index, "--fraction", 0.2) == 0
    assert "cats.idx is not there (--data-path says where the data is now)" in report_of(index)
    moved = (folder / "moved-cats", folder / "moved-code")
    assert select(index, "--fraction", 0.2, "--overwrite", "--data-path", *moved) == 0
    assert "sys.path" in report_of(index)
    before = files_in(folder)
    for words, message in [
        (("--data-path", *moved[::-1]), "is not the data that was scored"),
        (("--data-path", moved[0]), "--data-path names 1 datasets, the index has scores of 2"),
        (("--export-documents", folder / "text.jsonl"), "--export-documents"),
    ]:
        assert select(index, "--fraction", 0.3, "--overwrite", *words) == 2
        assert message in capsys.readouterr().err
    assert files_in(folder) == before
    content = (folder / "moved-cats.bin").read_bytes()
    (folder / "moved-cats.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert select(index, "--fraction", 0.3, "--overwrite", "--data-path", *moved) == 2
    assert (
        "moved-cats is not the data that was scored: it has 20 samples and the fingerprint sampled:" in capsys.readouterr().err
    )
