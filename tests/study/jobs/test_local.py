"""A study's jobs on this machine: order, number at once, failures, resuming, and leaving without orphans."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from megatron_salt.errors import UserError
from megatron_salt.files import sole_writer
from megatron_salt.study import execute
from megatron_salt.study.execute import run_jobs
from megatron_salt.study.job import TRAINER, CachedStage1, Job
from megatron_salt.study.jobs.local import environment_of, shares_of_gpus, visible_gpus
from megatron_salt.study.jobs.outcome import Outcome, last_error, read_outcome
from megatron_salt.study.jobs.status import Status, failed_needs, ready
from tests.study.jobs.small_jobs import began, job, wait_for

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "POLL_SECONDS", 0.02)


def study(jobs: Sequence[Job], base: Path, local: int = 1) -> tuple[int, str]:
    """Exit status of a study, and what it showed."""
    shown = io.StringIO()
    return run_jobs(jobs, base, local, out=shown), shown.getvalue()


def test_a_job_waits_for_its_needs_and_nothing_is_done_twice(tmp_path: Path) -> None:
    # d stands before its turn only by its needs; with two at once the order of ends is not that of the list
    jobs = [
        job(tmp_path, "a", "time.sleep(0.3)"),
        job(tmp_path, "b"),
        job(tmp_path, "c", needs=("a",)),
        job(tmp_path, "d", needs=("b", "c")),
    ]
    status, shown = study(jobs, tmp_path, local=2)
    assert status == 0 and sorted(began(tmp_path)[:2]) == ["a", "b"] and began(tmp_path)[2:] == ["c", "d"]
    assert "4 of 4 jobs done" in shown
    assert study(jobs, tmp_path, local=2)[0] == 0
    assert len(began(tmp_path)) == 4


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "the terminal is closed"), OSError(errno.ENOSPC, "full"), BrokenPipeError()]
)
def test_jobs_go_on_where_nobody_can_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, is_terminal: bool
) -> None:
    class Lost(io.StringIO):
        def write(self, text: str) -> int:
            raise error

        def isatty(self) -> bool:
            return is_terminal

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        Console, "on_broken_pipe", lambda console: sys.exit(1)
    )  # as rich does, without touching this process's stdout
    assert run_jobs([job(tmp_path, "a", "time.sleep(0.3)"), job(tmp_path, "b", needs=("a",))], tmp_path, 1, out=Lost()) == 0
    assert began(tmp_path) == ["a", "b"]


def test_a_job_that_cannot_be_started_does_not_end_those_that_run(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("a file in the way")
    jobs = [job(tmp_path, "a", "time.sleep(0.5)"), job(tmp_path, "b"), job(tmp_path, "c", needs=("b",))]
    status, shown = study(jobs, tmp_path, local=2)
    assert status == 1 and began(tmp_path) == ["a"] and (outcome := read_outcome(jobs[0].outcome)) is not None
    assert outcome.word == "done"
    assert "b: failed: it cannot be started: " in shown and "c: not run: needs b" in shown


def test_at_most_so_many_run_at_once(tmp_path: Path) -> None:
    count = "at_work = base / 'at_work'; at_work.mkdir(exist_ok=True); (at_work / name).touch()\n"
    count += "open(base / 'most', 'a').write(f'{len(list(at_work.iterdir()))} '); time.sleep(0.4); (at_work / name).unlink()"
    assert study([job(tmp_path, name, count) for name in "abcd"], tmp_path, local=2)[0] == 0
    assert max(map(int, (tmp_path / "most").read_text().split())) == 2


def test_a_failed_job_tells_why_and_stops_only_what_needs_it(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "bad", "raise ValueError('seven is not six')"),
        job(tmp_path, "refused", "print('error: --lr must be above 0', file=sys.stderr); sys.exit(2)"),
        job(tmp_path, "killed", "os.kill(os.getpid(), 9)"),
        job(tmp_path, "child", needs=("bad",)),
        job(tmp_path, "grandchild", needs=("child",)),
        job(tmp_path, "other"),
    ]  # fmt: skip
    status, shown = study(jobs, tmp_path, local=3)
    assert status == 1 and "1 of 6 jobs done" in shown
    assert "bad: failed: died: ValueError: seven is not six (exit status 1)" in shown
    assert "refused: failed: refused: --lr must be above 0" in shown
    assert "killed: failed: died: " in shown and "killed by SIGKILL" in shown
    assert "child: not run: needs bad" in shown and "grandchild: not run: needs child" in shown
    assert "child" not in began(tmp_path) and "other" in began(tmp_path)
    # and a report tells the first cause, though nothing has been started for it
    cause = "bad failed, died: ValueError: seven is not six (exit status 1)"
    assert failed_needs(jobs, {one.name: read_outcome(one.outcome) for one in jobs}) == {"child": cause, "grandchild": cause}
    # the user mends it: what failed starts again, what is done does not
    mended = [job(tmp_path, "bad"), *jobs[3:]]
    assert study(mended, tmp_path)[0] == 0
    assert began(tmp_path).count("other") == 1 and began(tmp_path)[-3:] == ["bad", "child", "grandchild"]


def test_a_run_that_is_not_finite_is_not_started_again(tmp_path: Path) -> None:
    one = job(tmp_path, "nan", "print('error: the loss is not finite'); sys.exit(4)")
    assert study([one], tmp_path)[0] == 1
    status, shown = study([one], tmp_path)
    assert status == 1 and began(tmp_path) == ["nan"]
    assert "nan: failed: nonfinite: the loss is not finite" in shown


def test_a_job_waits_for_an_earlier_start_that_still_saves(tmp_path: Path) -> None:
    """Jobs of a study that was killed save and leave; a new study may begin before they are gone."""
    held = threading.Event()

    def earlier_start() -> None:
        with sole_writer("job", tmp_path / "a/job"):
            held.set()
            time.sleep(1.0)
            (tmp_path / "released").touch()

    thread = threading.Thread(target=earlier_start)
    thread.start()
    held.wait()
    assert study([job(tmp_path, "a", "assert (base / 'released').exists()")], tmp_path)[0] == 0
    thread.join()


def test_a_run_whose_earlier_start_saves_while_it_waits_goes_on_from_that(tmp_path: Path) -> None:
    """As after a kill of a study whose run had begun from a stacked model, before its first checkpoint."""
    begins = ("--load", "stacked", "--finetune")
    tells = "(base / name / 'flags').write_text(' '.join(sys.argv[1:]))"
    held = threading.Event()

    def earlier_start() -> None:
        with sole_writer("job", tmp_path / "late/job"):
            held.set()
            time.sleep(1.0)
            (tmp_path / "late/iter_0000005").mkdir()

    jobs = [job(tmp_path, name, tells) for name in ("late", "new")]
    jobs = [replace(one, command=(*one.command, TRAINER, *begins)) for one in jobs]
    thread = threading.Thread(target=earlier_start)
    thread.start()
    held.wait()
    study(jobs, tmp_path, local=2)
    thread.join()
    flags = {one.name: (one.directory / "flags").read_text() for one in jobs}
    assert flags["new"].startswith(f"{TRAINER} --load stacked --finetune --outcome-file")
    assert flags["late"].startswith(f"{TRAINER} --outcome-file")


SALT, RKD = CachedStage1(("cache", 1), 30), CachedStage1(("cache", 1), 100)


def caching(base: Path, name: str, program: str = "", cached: CachedStage1 = SALT) -> Job:
    return replace(job(base, name, program, steps=100, arm=name), cached=cached)


def test_runs_with_the_same_samples_wait_until_one_has_filled_the_cache(tmp_path: Path) -> None:
    """a fills 30 steps and works on; b then reads them, and c, which has 100, computes the rest. Other seeds and plain runs do not wait."""
    count = "len((base / 'began').read_text().split())"
    until = f"end = time.monotonic() + 60\nwhile {count} < %d:\n    assert time.monotonic() < end; time.sleep(0.02)\n"
    entry = '{"kind": "step", "step": %d, "seconds": 1}'
    step = f"print('{entry}', file=open(base / name / 'train.jsonl', 'a'), flush=True)\n"
    fills = until % 3 + step % 30 + f"time.sleep(0.5)\nassert {count} == 3\n" + step % 31 + until % 5
    jobs = [
        caching(tmp_path, "c", cached=RKD),
        caching(tmp_path, "a", fills),
        caching(tmp_path, "b"),
        caching(tmp_path, "other", cached=replace(SALT, order=("cache", 2))),
        job(tmp_path, "plain", steps=100, arm="plain"),
    ]
    status, shown = study(jobs, tmp_path, local=5)
    assert status == 0, shown
    assert sorted(began(tmp_path)[:3]) == ["a", "other", "plain"] and sorted(began(tmp_path)[3:]) == ["b", "c"]


def test_the_next_run_fills_the_cache_where_the_first_one_cannot(tmp_path: Path) -> None:
    jobs = [caching(tmp_path, "a", "sys.exit(1)"), caching(tmp_path, "b", "time.sleep(0.3)"), caching(tmp_path, "c")]
    assert study(jobs, tmp_path, local=3)[0] == 1
    assert began(tmp_path) == ["a", "b", "c"]


def test_no_run_waits_for_one_that_waits_for_it(tmp_path: Path) -> None:
    """Whatever the lengths of stage 1 and the states: among the waiting jobs there is always one that may start."""
    draw = random.Random(5)
    for _ in range(300):
        lengths = [draw.choice((10, 20, 30)) for _ in range(6)]
        jobs = [caching(tmp_path, str(place), cached=replace(SALT, steps=length)) for place, length in enumerate(lengths)]
        statuses = {one.name: Status(draw.choice(("waiting", "waiting", "done", "failed", "left"))) for one in jobs}
        steps = {one.name: draw.choice((0, 15, 40)) for one in jobs}
        left = [one.name for one in jobs if statuses[one.name].state == "waiting"]
        assert bool(ready(jobs, statuses, steps)) == bool(left)


@pytest.mark.parametrize("line, outcome", [
    ("left 5 job -.0 before its last step, 9: SIGTERM received\n", Outcome("left", 5, "before its last step, 9: SIGTERM received")),
    ("machine node7 job 4711.2 host node7 cannot be used", Outcome("machine", None, "host node7 cannot be used")),
    ("done - finished    \n", Outcome("done", None, "finished")),
    ("ended 5 job -.0 words", None), ("    \n", None), ("", None), ("done", None), (b"\xff\xfe", None),
])  # fmt: skip
def test_an_outcome_file_is_read_or_is_none(tmp_path: Path, line: str | bytes, outcome: Outcome | None) -> None:
    (tmp_path / "outcome.txt").write_bytes(line if isinstance(line, bytes) else line.encode())
    assert read_outcome(tmp_path / "outcome.txt") == outcome
    assert read_outcome(tmp_path / "none.txt") is None


@pytest.mark.parametrize("log, error", [
    ("step 1\n[rank0]: Traceback:\n[rank0]: torch.OutOfMemoryError: 9 GiB\ntorch.elastic.errors.ChildFailedError: \n====\n",
     "torch.OutOfMemoryError: 9 GiB"),
    ("ValueError: one\nerror: --lr must be above 0\nleft\n", "--lr must be above 0"),
    ("2026-01-01 00:00:00 | error: stopped: 3 restarts\n", "stopped: 3 restarts"),
    ("loading\nSegmentation fault\n\n", "Segmentation fault"),
    ("\n", None),
])  # fmt: skip
def test_the_error_of_a_log(tmp_path: Path, log: str, error: str | None) -> None:
    (tmp_path / "log.txt").write_text("error: of an earlier start\n" + log)
    assert last_error(tmp_path / "log.txt", len("error: of an earlier start\n")) == error
    assert last_error(tmp_path / "none.txt") is None


def test_jobs_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    one = job(tmp_path, "a")
    with pytest.raises(UserError, match="two jobs of the study have the name a"):
        study([one, one], tmp_path)
    with pytest.raises(UserError, match=r"job b needs aa, which does not stand before it \(did you mean a\?\)"):
        study([one, job(tmp_path, "b", needs=("aa",))], tmp_path)
    with pytest.raises(UserError, match="--local must be at least 1 job at a time, got 0"):
        study([one], tmp_path, local=0)
    assert began(tmp_path) == []


STUDY = """
import sys
from pathlib import Path
from megatron_salt.study import execute
from tests.study.jobs.small_jobs import job
base = Path(sys.argv[1])
saves = "import signal\\ndef save(*_):\\n    (base / (name + '.saved')).touch(); sys.exit(3)\\nsignal.signal(signal.SIGTERM, save)\\n"
saves += "(base / (name + '.pid')).write_text(str(os.getpid()))\\nwhile True: time.sleep(0.02)"
sys.exit(execute.run_jobs([job(base, "a", saves), job(base, "b", saves), job(base, "c")], base, 2))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_signal_lets_jobs_save_and_leaves_no_child(tmp_path: Path, number: signal.Signals) -> None:
    """Killed by SIGKILL the study can do nothing: its jobs see that it is gone."""
    with subprocess.Popen(
        [sys.executable, "-c", STUDY, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as program:  # fmt: skip
        pids = [tmp_path / f"{name}.pid" for name in "ab"]
        wait_for(lambda: all(path.exists() and path.read_text() for path in pids))
        with pytest.raises(UserError, match=r"output .* is being written by process \d+"):
            run_jobs([job(tmp_path, "c")], tmp_path, 1, out=io.StringIO())
        program.send_signal(number)
        shown, _ = program.communicate(timeout=60)
    assert program.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not any(psutil.pid_exists(int(path.read_text())) for path in pids))
    wait_for(lambda: all(read_outcome(tmp_path / name / "outcome.txt") for name in "ab"))
    assert (tmp_path / "a.saved").exists() and (tmp_path / "b.saved").exists() and not (tmp_path / "c").exists()
    left = read_outcome(tmp_path / "a/outcome.txt")
    assert left is not None and left.word == "left"
    if number != signal.SIGKILL:
        assert "2 left" in shown and "the same command goes on" in shown
    # the same study again: all three
    jobs = [job(tmp_path, name) for name in "abc"]
    assert study(jobs, tmp_path, local=3)[0] == 0
    assert sorted(began(tmp_path)[2:]) == ["a", "b", "c"]


def test_a_job_shares_the_cores_and_is_no_rank_of_anything(tmp_path: Path) -> None:
    one = job(tmp_path, "a")
    inherited = {"RANK": "1", "WORLD_SIZE": "2", "HOME": "/root"}
    found = environment_of(one, inherited, 2, "4,5", 16)
    assert found["OMP_NUM_THREADS"] == "8" and found["CUDA_VISIBLE_DEVICES"] == "4,5" and found["HOME"] == "/root"
    assert not {"RANK", "WORLD_SIZE"} & set(found)
    assert environment_of(one, {"OMP_NUM_THREADS": "3"}, 2, None, 16)["OMP_NUM_THREADS"] == "3"
    assert environment_of(one, {}, 4, None, 2)["OMP_NUM_THREADS"] == "1"
    (tmp_path / "log").touch()
    assert os.pathsep.join([str(ROOT), "x"]) == environment_of(one, {"PYTHONPATH": "x"}, 1, None, 1)["PYTHONPATH"]


def test_gpus_are_shared_among_jobs(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,GPU-5a"}, tmp_path) == ["3", "GPU-5a"]
    assert shares_of_gpus(["0", "1", "2", "3", "4"], 2) == ["0,1", "2,3"]
    assert shares_of_gpus([], 2) == [None, None]
    with pytest.raises(UserError, match="--local 3: this machine shows 2 GPUs"):
        shares_of_gpus(["0", "1"], 3)
