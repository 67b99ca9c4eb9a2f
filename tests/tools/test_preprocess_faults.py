"""preprocess_data under faults: full disks, kills, workers that die; and in bounded memory, with a bar on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zstandard

from tests.support.datasets import (
    BYTES,
    ROOT,
    as_bytes,
    as_table,
    dataset,
    files_in,
    json_lines,
    run,
    tool,
    write,
    write_lines,
)


def test_a_full_disk_is_an_error_that_leaves_nothing(corpus, out):
    process = tool("--input", str(corpus), "--output-prefix", str(out / "d"), *BYTES, limit_blocks=8)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2 and "--output-prefix" in message and "Traceback" not in message and not files_in(out)


def test_after_a_full_disk_a_run_resumes(tmp_path, corpus, out):
    flags = ["--input", str(corpus), "--output-prefix", str(out / "d"), *BYTES, "--resume"]
    assert tool(*flags, limit_blocks=8).wait(timeout=60) == 2 and files_in(out)
    assert tool(*flags).wait(timeout=60) == 0 and run(corpus, tmp_path / "whole/d") == 0
    assert files_in(out) == files_in(tmp_path / "whole")


def test_a_closed_standard_output_is_one_line_and_leaves_nothing(corpus, out):
    """`preprocess_data ... | head`: the reader of the pipe is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--input",
        str(corpus),
        "--output-prefix",
        str(out / "d"),
        *BYTES,
    ]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode == 2 and not files_in(out)
    assert done.stderr == "error: standard output was closed before the end (| head?), so nothing was published\n"


def test_a_terminal_sees_a_bar(corpus, out):
    parent, child = os.openpty()
    assert tool("--input", str(corpus), "--output-prefix", str(out / "d"), *BYTES, stderr=child).wait(timeout=60) == 0
    os.close(child)
    shown = ""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(parent, 10_000):
            shown += part.decode()
    os.close(parent)
    assert "100%" in shown and "MB/s" in shown and "documents/s" in shown and "tokens/s" in shown and "left" in shown


def test_an_unwritable_place_is_refused_by_name(tmp_path, corpus, capsys):
    assert run(corpus, write(tmp_path / "file", b"") / "d") == 2
    assert "--output-prefix" in capsys.readouterr().err


TOLD_RUN = """
import resource, sys
from megatron_salt.tools import preprocess_data
code = preprocess_data.run_tool(preprocess_data.PreprocessConfig, preprocess_data.preprocess, sys.argv[1:])
own = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1]
print("memory", own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""VmHWM counts from the process's own start. ru_maxrss would include the memory of this test, which holds the texts."""


@pytest.mark.long
@pytest.mark.parametrize(
    "suffix, flags",
    [("jsonl", []), ("jsonl.zst", []), ("parquet", []), ("jsonl", ["--dedup", "exact", "--shuffle-documents", "1"])],
)
def test_ten_times_the_input_takes_no_more_memory(tmp_path, suffix, flags):
    """Short documents make the largest index. Peaks are in KiB, of the parent and of its largest child.

    Deduplication and shuffling use the memory that --max-memory leaves, and no more.
    """
    peaks = []
    for number in (60_000, 600_000):
        texts = [f"{i} document" for i in range(number)]
        path = tmp_path / f"{number}.{suffix}"
        if suffix == "parquet":
            as_table(path, {"text": texts}, row_group_size=30_000)
        else:
            path.write_bytes(json_lines(texts) if suffix == "jsonl" else zstandard.compress(json_lines(texts)))
        command = [
            sys.executable,
            "-c",
            TOLD_RUN,
            "--input",
            str(path),
            "--output-prefix",
            str(tmp_path / f"{number}/d"),
            *BYTES,
            "--workers",
            "2",
            "--max-memory",
            "0.6",
            *flags,
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=60,
        )
        peaks.append([int(word) for word in done.stdout.split("memory")[1].split()])
    assert peaks[1][0] + 2 * peaks[1][1] < 0.6 * 2**20, peaks
    if not flags:
        assert max(late - early for early, late in zip(*peaks, strict=True)) < 25_000, peaks


class Interrupted:
    """The tool with two workers, in the middle of its input: a pipe that this object keeps open."""

    def __init__(self, home: Path, out: Path) -> None:
        os.mkfifo(home / "pipe")
        self.stderr = home / "stderr"  # a file: a pipe would stay open as long as a worker lives
        with open(self.stderr, "w") as stderr:
            self.process = tool(
                "--input",
                str(home / "pipe"),
                "--output-prefix",
                str(out / "d"),
                *BYTES,
                "--workers",
                "2",
                "--log-interval",
                "1",
                stderr=stderr,
            )
        self.deadline = threading.Timer(60, self.process.kill)
        self.deadline.start()
        self.pipe = open(home / "pipe", "w")  # noqa: SIM115 (closed by close)
        self.feed()
        assert self.process.stdout is not None and any(" documents, " in line for line in self.process.stdout)
        assert (out / "d_text_document.tmp.bin").exists()
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(self.workers) == 2

    def feed(self) -> None:
        for _ in range(20):
            self.pipe.write(json.dumps({"text": "x" * 1_000_000}) + "\n")
            self.pipe.flush()

    def close(self) -> str:
        """Close the pipe and wait for the tool. Returns its stderr."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.close()
        self.process.wait()
        self.deadline.cancel()
        return self.stderr.read_text()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.long
def test_kill_9_leaves_no_dataset_and_no_worker_and_the_next_run_is_whole(tmp_path, out):
    run_in_progress = Interrupted(tmp_path, out)
    run_in_progress.process.kill()
    run_in_progress.close()
    deadline = time.monotonic() + 20
    while any(map(is_running, run_in_progress.workers)):
        assert time.monotonic() < deadline, "workers outlive the killed run"
        time.sleep(0.05)
    assert all(".tmp." in name for name in files_in(out))
    assert run(write_lines(tmp_path / "x.jsonl", ["a"]), out / "d") == 0
    assert dataset(out / "d") == as_bytes(["a"]) and not any(".tmp" in name for name in files_in(out))


def test_what_a_killed_run_left_does_not_get_into_the_next_dataset(tmp_path, corpus, out):
    assert run(corpus, out / "clean") == 0
    stale = out / "d_text_document.tmp.tokenizer"
    stale.mkdir()
    (stale / "tokenizer.model").write_bytes(b"of another tokenizer")
    assert run(corpus, out / "d") == 0
    assert {name.replace("d_", "clean_", 1): content for name, content in files_in(out).items() if name.startswith("d_")} == {
        name: content for name, content in files_in(out).items() if name.startswith("clean_")
    }


@pytest.mark.long
def test_a_worker_that_dies_ends_the_run_with_a_message(tmp_path, out):
    run_in_progress = Interrupted(tmp_path, out)
    os.kill(run_in_progress.workers[0], 9)
    with contextlib.suppress(BrokenPipeError):
        run_in_progress.feed()
    message = run_in_progress.close()
    assert run_in_progress.process.returncode == 2 and "--workers 2" in message and "Traceback" not in message
    assert not files_in(out)
