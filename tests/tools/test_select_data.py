"""select_data: what it writes is the rule's choice, what it reports is true, and mistakes are refused by name and lose nothing."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.cli import run_tool
from megatron_salt.config import TokenizerConfig
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.manifest import DatasetFacts, fingerprint, tokenizer_directory
from megatron_salt.data.windows import Windows
from megatron_salt.preprocess.indexed_writer import IndexedWriter
from megatron_salt.selection.score_format import content_hashes
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.selection.selection_file import Selection
from megatron_salt.selection.ties import TIE_SEED, tie_ranks
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.tools.select_data import SelectConfig, select_data
from tests.support.score_files import files_in, manifest_of, random_rows, write_index

LENGTH = 16
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
TEXTS = (
    "the cat sat on the mat and then sat on it again, all day long. " * 9,
    "import os; import sys; print(os.sep, sys.path)\n" * 9,
)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Scores of two byte-level datasets of 20 and 11 windows: 0.0, 0.1, ... by id for the default score, other columns at random."""
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
    """Oracle: sort the scored samples. Of two equal windows one is dropped only where both are scored."""
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
    told = report_of(index)
    assert "chosen by score median_dropped_10, name top, fraction 0.5" in told and "step 7, w" in told
    assert "not eligible: 3 held out (--valid-share 0.1), 0 without a token that counts, 1 duplicates" in told
    lines = [line.split() for line in told.splitlines() if line.endswith(("cats", "code"))]
    assert [(line[0], line[1], line[2], line[4]) for line in lines[:2]] == [("20", "18", "5", "1.3"), ("11", "9", "9", "1.3")]
    assert sum(int(count) for count in re.findall(r"^ +[\d.]+ [|>][#.]* (\d+) of \d+$", told, re.MULTILINE)) == 14
    assert re.search(r"%  median_zeroed_1$", told, re.MULTILINE) and "by chance 51.9%" in told
    best = told.partition("highest scores:")[2].splitlines()
    assert "sample 29 " in best[1] and "2.9, chosen:" in best[1] and "sys.path" in best[1] + best[2]
    assert "sample 12 " in told.partition("not chosen, next to the cut:")[2].splitlines()[1]
    assert "sample 0 " in told.partition("lowest scores:")[2]


@pytest.mark.parametrize("rule, skip", [("top", 0), ("bottom", 0), ("band", 6)])
def test_the_overlap_is_that_of_two_sorts(index: Path, rule: str, skip: int) -> None:
    """Oracle: by either score sort the samples, ties by rank, and take seven."""
    assert select(index, "--num-samples", 7, "--rule", rule, *(("--band-skip", 0.2) if skip else ())) == 0
    opened = ScoreIndex.open([str(index)])
    told = {name: share for share, name in re.findall(r"^ +([\d.]+%)  (\w+)$", report_of(index), re.MULTILINE)}
    assert len(told) == 12 and "median_dropped_10" not in told
    for name, share in told.items():
        scores = opened.read(name, 0, 31)
        taken = set(
            np.lexsort((tie_ranks(np.arange(31), TIE_SEED), scores if rule == "bottom" else -scores))[skip : skip + 7].tolist()
        )
        assert share == f"{len(taken & set(chosen(index))) / 7:.1%}", name


def test_ties_at_the_cut_are_told(index: Path, tmp_path: Path) -> None:
    """With a score of 0 in every window but three, five are chosen by nothing but the order of ties, which is the seed's."""
    opened = manifest_of([40])
    write_index(tmp_path / "flat", opened, random_rows(opened, median_zeroed_10=np.arange(40) // 37))
    for words, seed in (((), TIE_SEED), (("--tie-seed", 5), 5)):
        flags = ("--score", "median_zeroed_10", "--num-samples", 8, "--overwrite", "--allow-ties")
        assert select(tmp_path / "flat", *flags, *words) == 0
        assert chosen(index) == [*sorted(np.argsort(tie_ranks(np.arange(37), seed))[:5].tolist()), 37, 38, 39]
        manifest = Selection.open(str(index.parent / "chosen")).manifest
        assert (manifest.tie_seed, manifest.tie_share) == (seed, 5 / 8)
    told = report_of(index)
    assert (
        "5 of the 8 chosen ones, 62.50%, have the very score of a cut, as others have that were not chosen: --tie-seed 5 decided"
        in told
    )
    assert "a zeroed median is 0 where half of the tokens or more are outside the top k" in told
    assert "d0.idx is not there" in told


@pytest.mark.parametrize("per_dataset", [False, True])
@pytest.mark.parametrize("rule, skip", [("top", 0.0), ("bottom", 0.0), ("band", 0.2)])
def test_a_score_that_does_not_tell_samples_apart_is_refused_and_those_that_do_are_named(
    tmp_path: Path, rule: str, skip: float, per_dataset: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the share that the tool itself records when it is told to choose by each of the other scores."""
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
    told = capsys.readouterr().err
    assert "--score median_dropped_10 does not tell the samples apart: 50 of the 50 that would be chosen, 100.0%," in told
    assert told.count("\n") == 1 and "or --allow-ties" in told and files_in(tmp_path) == before
    named = dict(re.findall(r"(\w+) \(([\d.]+%)\)", told))
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
    for words, told in [
        (("--data-path", *moved[::-1]), "is not the data that was scored"),
        (("--data-path", moved[0]), "--data-path names 1 datasets, the index has scores of 2"),
        (("--export-documents", folder / "text.jsonl"), "--export-documents"),
    ]:
        assert select(index, "--fraction", 0.3, "--overwrite", *words) == 2
        assert told in capsys.readouterr().err
    assert files_in(folder) == before
    content = (folder / "moved-cats.bin").read_bytes()
    (folder / "moved-cats.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert select(index, "--fraction", 0.3, "--overwrite", "--data-path", *moved) == 2
    assert (
        "moved-cats is not the data that was scored: it has 20 samples and the fingerprint sampled:" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "words, told",
    [
        ((), "--rule top takes either --fraction or --num-samples"),
        (("--fraction", 0.5, "--num-samples", 3), "--rule top takes either --fraction or --num-samples"),
        (("--fraction", 1.5), "--fraction must be above 0 and at most 1, got 1.5"),
        (("--fraction", 0), "--fraction must be above 0 and at most 1, got 0"),
        (("--num-samples", 0), "--num-samples must be at least 1, got 0"),
        (("--num-samples", 32), "32"),
        (("--fraction", 0.5, "--score", "best"), "--score best is not a score of the index: it has median_zeroed_1, "),
        (("--fraction", 0.5, "--score", "content"), "--score content is not a score of the index"),
        (("--fraction", 0.5, "--min-score", 1), "--min-score does not go with --rule top, which takes --fraction --num-samples"),
        (("--fraction", 0.5, "--rule", "threshold", "--min-score", 1), "--fraction does not go with --rule threshold"),
        (("--rule", "threshold"), "--rule threshold needs --min-score"),
        (("--rule", "threshold", "--min-score", 99), "99"),
        (("--rule", "band", "--fraction", 0.5), "--rule band needs --band-skip"),
        (("--fraction", 0.5, "--seed", 1), "--seed does not go with --rule top"),
        (("--fraction", 0.5, "--rule", "random", "--tie-seed", 1), "--tie-seed does not go with --rule random"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(index: Path, words: tuple, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(index.parent)
    assert select(index, *words) == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err
    assert files_in(index.parent) == before


def test_what_is_there_is_replaced_only_when_asked(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert select(index, "--num-samples", 3) == 0
    assert select(index, "--num-samples", 4) == 2
    assert "chosen.json" in (err := capsys.readouterr().err) and "--overwrite replaces it" in err
    assert len(chosen(index)) == 3
    assert select(index, "--num-samples", 4, "--overwrite") == 0
    assert len(chosen(index)) == 4


def test_damaged_and_nan_scores_are_refused(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    column = next(index.glob("samples-*/median_dropped_10.npy"))
    content = column.read_bytes()
    column.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
    assert select(index, "--num-samples", 3) == 2
    assert str(column) in capsys.readouterr().err
    manifest = manifest_of([40])
    scores = np.arange(40.0)
    scores[[7, 9]] = np.nan
    write_index(index.parent / "nan", manifest, random_rows(manifest, median_dropped_10=scores))
    assert select(index.parent / "nan", "--num-samples", 3) == 2
    assert "2" in (err := capsys.readouterr().err) and "NaN" in err and "7" in err
    assert not (index.parent / "chosen.npy").exists()


def test_datasets_that_are_equal_give_their_windows_twice_where_allowed_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of([1], datasets=tuple(DatasetFacts(name, "content:same", 9) for name in ("one", "two")))
    write_index(tmp_path / "scores", manifest, random_rows(manifest))
    assert select(tmp_path / "scores", "--fraction", 0.5) == 2
    assert "--scores are of one and two, which hold the same tokens" in capsys.readouterr().err
    assert select(tmp_path / "scores", "--fraction", 0.5, "--allow-duplicate-inputs") == 0
    assert (
        select(tmp_path / "scores", "--fraction", 0.5, "--overwrite", "--scores", tmp_path / "scores", tmp_path / "scores") == 2
    )
    assert "--scores names" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    (("--fraction", "0.5", "--tie-seed", "-1"), "--tie-seed must be from 0 to 2^63 - 1"),
    (("--fraction", "0.5", "--tie-seed", 10**30), "--tie-seed must be from 0 to 2^63 - 1"),
    (("--fraction", "0.5", "--rule", "random", "--seed", 10**30), "--seed must be from 0 to 2^63 - 1"),
    (("--rule", "threshold", "--min-score", "-inf"), "--min-score must be a finite number"),
    (("--rule", "threshold", "--min-score", "0", "--max-score", "inf"), "--max-score must be finite"),
    (("--fraction", "0.5", "--exclude-duplicates", "--max-memory-gib", "1e300"), "--max-memory-gib must be above 0"),
    (("--fraction", "0.5", "--output", ""), "names no selection"),
    (("--fraction", "0.5", "--output", "nowhere/.npy"), "names no selection"),
])  # fmt: skip
def test_what_no_selection_could_record_is_refused_before_anything_is_written(index, capsys, words, told):
    before = files_in(index.parent)
    assert select(index, *words) == 2
    assert told in capsys.readouterr().err
    assert files_in(index.parent) == before


@pytest.mark.parametrize("name", ["chosen.json", "chosen.npy", "chosen.txt", "chosen", "scores/texts.jsonl"])
def test_exported_documents_replace_no_other_file_of_the_selection(index, capsys, name):
    before = files_in(index.parent)
    assert select(index, "--fraction", "0.5", "--overwrite", "--export-documents", index.parent / name) == 2
    assert "--export-documents" in capsys.readouterr().err
    assert files_in(index.parent) == before


def test_a_full_disk_keeps_the_selection_that_is_there_and_leaves_no_remains(index, capsys, monkeypatch):
    assert select(index, "--fraction", "0.5") == 0
    before, dumps = files_in(index.parent), json.dumps

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("megatron_salt.data.manifest.json.dump", full)
        assert select(index, "--fraction", "0.25", "--overwrite") == 2
    assert "No space left" in capsys.readouterr().err
    assert files_in(index.parent) == before
    with monkeypatch.context() as patch:
        patch.setattr(
            "megatron_salt.tools.select_data.json.dumps",
            lambda row, **kinds: full() if "window" in row else dumps(row, **kinds),
        )
        assert select(index, "--fraction", "0.25", "--overwrite", "--export-documents", index.parent / "texts.jsonl") == 2
    assert not list(index.parent.glob("*.tmp"))
