"""preprocess_data --resume: after a kill at any byte the run goes on, and its files are those of a run that nobody killed."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from sentencepiece import SentencePieceTrainer

from megatron_salt.cli import run_tool
from megatron_salt.preprocess import staging
from megatron_salt.tools import preprocess_data
from megatron_salt.tools.preprocess_data import PreprocessConfig, preprocess
from tests.support.datasets import files_in

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}: " + "ça et là 日本 🎉\n" * (i % 7 + 1) for i in range(200)]
FLAGS = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--max-bad-lines", "3", "--json-keys", "text", "title"]
PUBLISHED = {
    f"d_{key}_document.{suffix}"
    for key in ("text", "title")
    for suffix in ("bin", "idx", "manifest.json", "tokenizer/tokenizer_description.json")
}


class Stop(BaseException):
    """Stands for the death of the process."""


def corpus(home: Path) -> list[str]:
    """Write a file of every form, with two bad lines in all."""
    rows = [json.dumps({"text": text, "title": f"title {i}"}) for i, text in enumerate(TEXTS)]
    lines = "\n".join([*rows[:30], "bad", *rows[30:]]) + "\n"
    (home / "a.jsonl").write_text(lines)
    (home / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (home / "c.jsonl.zst").write_bytes(zstandard.compress("\n".join(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "title": TEXTS[::-1]}), home / "d.parquet", row_group_size=70)
    return [str(home / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")]


def run(inputs: list[str], out: Path, *flags: str) -> int:
    return run_tool(PreprocessConfig, preprocess, ["--input", *inputs, "--output-prefix", str(out / "d"), *FLAGS, *flags])


@pytest.fixture
def eager(monkeypatch):
    """Small chunks, and a journal note after each."""
    monkeypatch.setattr(preprocess_data, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(staging, "JOURNAL_SECONDS", 0.0)


def stop_after(monkeypatch, chunks: int) -> None:
    """Stop the run at its chunk number `chunks`, after the chunk is written and before the journal notes it."""
    whole, seen = staging.StagingArea.note, [0]

    def note(self):
        seen[0] += 1
        if seen[0] > chunks:
            raise Stop
        whole(self)

    monkeypatch.setattr(staging.StagingArea, "note", note)


def stopped(inputs: list[str], out: Path, chunks: int, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, chunks)
        with pytest.raises(Stop):
            run(inputs, out, "--resume", *flags)
    assert files_in(out) and not PUBLISHED & set(files_in(out))


@pytest.mark.parametrize(
    "chunks, flags",
    [*((chunks, []) for chunks in (0, 1, 5, 17, 40, 70)), (40, ["--dedup", "exact", "--shuffle-documents", "7"])],
)
def test_a_run_that_stops_anywhere_goes_on(tmp_path, eager, capsys, chunks, flags):
    inputs = corpus(tmp_path)
    assert run(inputs, tmp_path / "whole", *flags) == 0
    stopped(inputs, tmp_path / "out", chunks, *flags)
    for name in (
        "d_text_document.tmp.bin",
        "d_title_document.tmp.lengths",
    ):  # and what a kill leaves of writes that were under way
        with open(tmp_path / "out" / name, "ab") as stream:
            stream.write(b"torn")
    capsys.readouterr()
    assert run(inputs, tmp_path / "out", "--resume", *flags) == 0
    assert ("resuming" in capsys.readouterr().out) == (chunks > 0)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_a_run_may_go_on_with_another_backend_and_the_manifest_names_both(tmp_path, eager):
    inputs = corpus(tmp_path)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tmp_path / "t.model")]
    assert run(inputs, tmp_path / "whole", *tokenizer, "--tokenizer-backend", "reference") == 0
    stopped(inputs, tmp_path / "out", 5, *tokenizer, "--tokenizer-backend", "gigatoken")
    assert run(inputs, tmp_path / "out", "--resume", *tokenizer, "--tokenizer-backend", "reference") == 0
    found, whole = files_in(tmp_path / "out"), files_in(tmp_path / "whole")
    for key in ("text", "title"):
        manifest, expected = (json.loads(files.pop(f"d_{key}_document.manifest.json")) for files in (found, whole))
        assert (manifest.pop("tokenizer_backends"), expected.pop("tokenizer_backends")) == (
            ["gigatoken", "reference"],
            ["reference"],
        )
        assert manifest == expected
    assert found == whole


def test_a_journal_may_end_at_any_byte(tmp_path, eager):
    inputs = corpus(tmp_path)[:1]
    assert run(inputs, tmp_path / "whole") == 0
    stopped(inputs, tmp_path / "out", 3)
    journal = (tmp_path / "out/d.tmp.journal").read_bytes()
    last = journal[:-1].rfind(b"\n") + 1
    for end in [0, 1, last - 1, last, last + 1, (last + len(journal)) // 2, len(journal) - 1, len(journal)]:
        shutil.copytree(tmp_path / "out", tmp_path / f"cut{end}")
        (tmp_path / f"cut{end}/d.tmp.journal").write_bytes(journal[:end])
        assert run(inputs, tmp_path / f"cut{end}", "--resume") == 0
        assert files_in(tmp_path / f"cut{end}") == files_in(tmp_path / "whole")


def test_a_kill_while_it_is_published_does_no_harm(tmp_path):
    inputs = corpus(tmp_path)
    assert run(inputs, tmp_path / "whole") == 0
    for moved in range(9):
        out = tmp_path / str(moved)
        with pytest.MonkeyPatch.context() as patch:
            whole, seen = os.replace, [0]

            def replace(source, target, whole=whole, seen=seen, moved=moved):
                if str(target).startswith(str(tmp_path)) and ".tmp" not in str(target) and "tokenizer/" not in str(target):
                    seen[0] += 1
                    if seen[0] > moved:
                        raise Stop
                whole(source, target)

            patch.setattr(os, "replace", replace)
            if moved < 8:
                with pytest.raises(Stop):
                    run(inputs, out, "--resume")
            else:
                assert run(inputs, out, "--resume") == 0
        assert run(inputs, out, "--resume") == 0
        assert files_in(out) == files_in(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda inputs, out: run(inputs[:2], out, "--resume"), "other --input"),
        (lambda inputs, out: run(inputs, out, "--resume", "--json-keys", "text"), "other --json-keys"),
        (lambda inputs, out: run(inputs, out, "--resume", "--no-append-eod"), "other --append-eod"),
        (lambda inputs, out: run(inputs, out), "--resume goes on where it was, --overwrite starts anew"),
    ],
)
def test_another_run_does_not_go_on_with_it(tmp_path, eager, capsys, change, word):
    inputs = corpus(tmp_path)
    stopped(inputs, tmp_path / "out", 5)
    before = files_in(tmp_path / "out")
    assert change(inputs, tmp_path / "out") == 2
    assert word in capsys.readouterr().err and files_in(tmp_path / "out") == before
    assert run(inputs, tmp_path / "out", "--overwrite") == 0


def test_input_and_output_that_were_changed_are_found(tmp_path, eager, capsys):
    inputs = corpus(tmp_path)
    stopped(inputs, tmp_path / "out", 9)
    stored = tmp_path / "out/d_text_document.tmp.bin"
    whole = stored.read_bytes()
    stored.write_bytes(b"x" + whole[1:])
    assert run(inputs, tmp_path / "out", "--resume") == 2 and "is not what the killed run wrote" in capsys.readouterr().err
    stored.write_bytes(whole[:9])
    assert run(inputs, tmp_path / "out", "--resume") == 2 and "is not what the killed run wrote" in capsys.readouterr().err
    stored.write_bytes(whole)
    text = Path(inputs[0]).read_text()
    Path(inputs[0]).write_text(text.replace("document 3", "document 9"))
    assert run(inputs, tmp_path / "out", "--resume") == 2 and "other --input" in capsys.readouterr().err
    Path(inputs[0]).write_text(text)
    assert run(inputs, tmp_path / "out", "--resume") == 0


def test_a_run_that_fails_keeps_what_it_did_if_it_may_be_resumed(tmp_path, eager, capsys):
    inputs = corpus(tmp_path)
    assert run(inputs, tmp_path / "out", "--max-bad-lines", "1") == 2
    assert not files_in(tmp_path / "out")
    assert run(inputs, tmp_path / "out", "--resume", "--max-bad-lines", "1") == 2
    assert "2 bad lines so far, --max-bad-lines allows 1" in capsys.readouterr().err
    assert run(inputs, tmp_path / "out", "--resume", "--max-bad-lines", "2") == 0
    assert run(inputs, tmp_path / "whole") == 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_two_runs_do_not_write_the_same_output(tmp_path, eager, capsys):
    inputs = corpus(tmp_path)
    (tmp_path / "out").mkdir()
    journal = staging.Journal(staging.journal_path(str(tmp_path / "out/d")))
    assert run(inputs, tmp_path / "out", "--resume") == 2
    assert "held by another process" in capsys.readouterr().err
    journal.close()


SLOW_RUN = """
import sys
from megatron_salt.preprocess import staging
from megatron_salt.tools import preprocess_data
staging.JOURNAL_SECONDS, preprocess_data.CHUNK_BYTES = 0.0, 500
print("begins", flush=True)
sys.exit(preprocess_data.run_tool(preprocess_data.PreprocessConfig, preprocess_data.preprocess, sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_kill_9_at_random_moments(tmp_path, workers):
    inputs, chance = corpus(tmp_path), random.Random(workers)
    assert run(inputs, tmp_path / "whole") == 0
    command = [
        sys.executable,
        "-c",
        SLOW_RUN,
        "--input",
        *inputs,
        "--output-prefix",
        str(tmp_path / "out/d"),
        *FLAGS,
        "--resume",
        "--workers",
        str(workers),
    ]
    kills = 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        if kills == 5:
            break
        time.sleep(chance.random() * (0.2 if workers == 1 else 2))
        process.kill()
        process.communicate()
        kills += 1
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
