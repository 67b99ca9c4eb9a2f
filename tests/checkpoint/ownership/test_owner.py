from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_salt.checkpoint import owner
from megatron_salt.checkpoint.owner import LOCK, Owner, acquire, decide, myself, owned, read
from megatron_salt.errors import LeftEarly, UserError

ME = Owner(host="here", machine="boot 1", pid=100, started="5000", job="", start=(0, 0), token="mine")
THERE = replace(ME, host="there", machine="boot 2", token="theirs")


def lock(directory: Path, of: Owner, beat: int = 0) -> None:
    directory.mkdir(exist_ok=True)
    (directory / LOCK).write_text(json.dumps({**asdict(of), "beat": f"{beat:012}"}))


@pytest.mark.parametrize(
    "found, mine, start_of_pid, verdict",
    [
        (None, ME, None, "watch"),
        (replace(ME, token="theirs"), ME, "5000", "refuse"),
        (replace(ME, token="theirs"), ME, None, "take"),
        (replace(ME, token="theirs"), ME, "7000", "take"),  # its pid is another process's by now
        (replace(ME, token="theirs", machine="boot 0"), ME, "5000", "watch"),  # this host before it was started anew
        (replace(ME, token="theirs", machine=""), replace(ME, machine=""), None, "watch"),
        (THERE, ME, None, "watch"),
        (replace(THERE, job="7"), replace(ME, job="7"), None, "watch"),
        (replace(THERE, job="7"), replace(ME, job="7", start=(1, 1)), None, "take"),
        (replace(THERE, job="7", start=(1, 1)), replace(ME, job="7", start=(1, 2)), None, "take"),
        (replace(THERE, job="7", start=(0, 9)), replace(ME, job="7", start=(1, 1)), None, "take"),
        (replace(THERE, job="7", start=(2, 1)), replace(ME, job="7", start=(1, 9)), None, "watch"),
        (replace(THERE, job="7"), replace(ME, job="8", start=(1, 1)), None, "watch"),
    ],
)
def test_what_a_newcomer_does_about_an_owner(found: Owner | None, mine: Owner, start_of_pid: str | None, verdict: str) -> None:
    assert decide(found, mine, lambda pid: start_of_pid, take_over=False)[0] == verdict
    assert decide(found, mine, lambda pid: start_of_pid, take_over=True)[0] == "take"


def test_a_launch_orders_the_starts_of_one_job() -> None:
    assert myself({}).job == "" and myself({}).start == (0, 0)
    assert myself({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}).start == (2, 0)
    launched = myself({"SLURM_JOB_ID": "7", "SALT_LAUNCH": "7.2.3"})
    assert (launched.job, launched.start) == ("7", (2, 3))


def test_a_directory_is_free_again_after_its_owner_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "run", myself({}), take_over=False):
        assert read(tmp_path / "run")[0] is not None
        raise ZeroDivisionError
    assert list((tmp_path / "run").iterdir()) == []


def test_a_living_process_is_refused_by_name_and_a_dead_one_is_not(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from megatron_salt.checkpoint.owner import acquire, myself\n"
    code += "acquire(Path(sys.argv[1]), myself({'SLURM_JOB_ID': '77'}), False); print('owns', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"owns\n"
        before = (tmp_path / LOCK).read_bytes()
        for look in (lambda: acquire(tmp_path, myself({}), take_over=False), lambda: owner.refuse_living(tmp_path)):
            with pytest.raises(UserError) as refused:
                look()
            for part in (str(tmp_path), str(other.pid), "job 77", "--take-over-save"):
                assert part in str(refused.value)
        assert (tmp_path / LOCK).read_bytes() == before
    finally:
        other.kill()  # no release, and a zombie until it is waited for
    while owner.process_start(other.pid) is not None:
        time.sleep(0.01)
    with owned(tmp_path, myself({}), take_over=False) as ownership:
        ownership.check()
    other.communicate()


def test_an_owner_elsewhere_that_counts_on_is_refused_and_one_that_stands_still_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock(tmp_path, THERE)
    beats = threading.Timer(0.2, lock, (tmp_path, THERE, 1))
    beats.start()
    with pytest.raises(UserError, match="process 100 on there"):
        acquire(tmp_path, myself({}), take_over=False, watch=5.0)
    beats.join()
    with owned(tmp_path, myself({}), take_over=False, watch=0.3) as ownership:
        ownership.check()
    assert "watching it for 0.3 s" in caplog.text and "stood still" in caplog.text
    assert "owned by" in (lock(tmp_path, THERE), owner.refuse_living(tmp_path))[1]


def test_an_owner_that_is_released_while_it_is_watched_makes_way(tmp_path: Path) -> None:
    lock(tmp_path, THERE)
    threading.Timer(0.2, (tmp_path / LOCK).unlink).start()
    with owned(tmp_path, myself({}), take_over=False, watch=30.0) as ownership:
        ownership.check()


def test_a_beat_changes_the_lock_and_never_its_length(tmp_path: Path) -> None:
    with owned(tmp_path, myself({}), take_over=False, beat=0.02):
        first = (tmp_path / LOCK).read_bytes()
        deadline = time.monotonic() + 10
        while (now := (tmp_path / LOCK).read_bytes()) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert now != first and len(now) == len(first)


def test_the_loser_of_a_takeover_is_told_and_leaves_the_winner_alone(tmp_path: Path) -> None:
    loser = acquire(tmp_path, myself({}), take_over=False, beat=0.02)
    winner = acquire(tmp_path, myself({}), take_over=True)
    with pytest.raises(UserError, match="taken over by process"):
        loser.check()
    time.sleep(0.1)  # of beats
    loser.release()
    winner.check()
    winner.release()
    assert list(tmp_path.iterdir()) == []


UNPRINTABLE = json.dumps({**asdict(THERE), "host": "x\nerror: y"})
INFINITE = json.dumps({**asdict(THERE), "pid": 1e308}).replace("1e+308", "1e999")


@pytest.mark.parametrize("content", ["", "null", "[]", '{"pid": "x"}', "\0", '{"start": 1}', UNPRINTABLE, INFINITE])
def test_a_lock_that_cannot_be_read_is_watched_and_taken(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with owned(tmp_path, myself({}), take_over=False, watch=0.1) as ownership:
        ownership.check()


@pytest.mark.parametrize("target", ["absent", LOCK])
def test_a_link_without_a_target_is_refused_and_never_waited_for(tmp_path: Path, target: str) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / target)
    for look in (lambda: acquire(tmp_path, myself({}), take_over=False), lambda: owner.refuse_living(tmp_path)):
        with pytest.raises(
            UserError, match=f"^--save {tmp_path}: {LOCK} is no run's: it is a link without a target; remove it$"
        ):
            look()


def test_the_loser_of_a_takeover_knows_it_at_its_next_beat(tmp_path: Path) -> None:
    loser = acquire(tmp_path, myself({}), take_over=False, beat=0.02)
    time.sleep(0.1)
    assert not loser.is_lost()
    winner = acquire(tmp_path, myself({}), take_over=True, beat=0.02)
    deadline = time.monotonic() + 10
    while not loser.is_lost() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loser.is_lost() and not winner.is_lost()
    loser.release()
    winner.release()


def test_a_signal_ends_the_watch_at_once_and_the_owner_keeps_the_directory(tmp_path: Path) -> None:
    lock(tmp_path, THERE)
    before = (tmp_path / LOCK).read_bytes()
    started, told = time.monotonic(), threading.Event()
    threading.Timer(0.1, told.set).start()
    with pytest.raises(LeftEarly, match="told to leave while watching the owner of --save") as left:
        acquire(tmp_path, myself({}), take_over=False, leaving=told.is_set)
    assert time.monotonic() - started < 10 and (left.value.status, left.value.outcome) == (0, "left")
    assert (tmp_path / LOCK).read_bytes() == before
