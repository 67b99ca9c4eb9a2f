"""If a rank fails or does not join, the others end within seconds and one reports the error: real processes that meet at a store."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_salt import pretrain
from megatron_salt.cli import exit_status
from megatron_salt.errors import UserError
from megatron_salt.parallel import failure, rendezvous
from megatron_salt.parallel.failure import fail_together
from megatron_salt.parallel.launch import distributed
from megatron_salt.parallel.launch_store import Launch
from tests.support.program import argv, write_tokens
from tests.support.ranks import run_ranks

SOON = 12.0
"""Seconds from a failure to the end of the last rank: a look, the patience, and a crowded machine."""


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    status: int
    out: str
    err: str

    def when(self, word: str) -> float:
        """The time at which the rank printed a word."""
        return next(float(line.split()[1]) for line in self.out.splitlines() if line.startswith(f"{word} "))


def work(fails: bool, where: str, how: str, join: float) -> None:
    """The program of a rank, which may fail at a given place in a given way."""

    def fail_at(place: str) -> None:
        if fails and place == where:
            say("failing")
            if how == "mistake":
                raise UserError("--data-path words is not on this node")
            if how == "bug":
                raise KeyError("a bug")
            os.kill(os.getpid(), signal.SIGKILL)

    fail_at("before")
    with distributed(timedelta(minutes=5), timedelta(seconds=join)):
        fail_at("build")
        if where == "build":
            time.sleep(60)
        dist.all_reduce(torch.ones(1))
        fail_at("training")
        dist.all_reduce(torch.ones(1))
    say("left")


def say(word: str) -> None:
    print(f"{word} {time.time()}", flush=True)


def alone(
    rank: int,
    environment: dict[str, str],
    output: Path,
    report_every: float,
    action: Callable[..., int | None],
    *arguments: Any,
) -> None:
    """Run a rank in this process."""
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    rendezvous.REPORT_EVERY = rendezvous._SLACK = report_every
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}-{rank}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.exit(exit_status(lambda: fail_together(lambda: action(*arguments))))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(
    tmp_path: Path, world_size: int, fails: int, where: str, how: str, come: list[int] | None = None, join: float = 60.0,
    report_every: float = 30.0,
) -> list[Ended]:  # fmt: skip
    """Run `work` on the ranks that join."""
    ranks = list(range(world_size)) if come is None else come
    return launch(tmp_path, world_size, report_every, {rank: (work, rank == fails, where, how, join) for rank in ranks})


def launch(
    tmp_path: Path, world_size: int, report_every: float, calls: dict[int, tuple[Any, ...]], agent: dist.TCPStore | None = None
) -> list[Ended]:
    """Run a function with its arguments on each rank of one node, as srun would start them, or with a store as torchrun's agent has it."""
    run_ranks(1, os.getpid)  # the pool's fork server has made the imports
    port = free_port() if agent is None else agent.port
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": str(agent is not None)}
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=alone, args=(rank, environment, tmp_path / "rank", report_every, *call))
        for rank, call in calls.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    hang = [process.pid for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hang
    texts = [[Path(f"{tmp_path}/rank-{rank}.{name}").read_text() for name in ("out", "err")] for rank in calls]
    return [Ended(process.exitcode or 0, *text) for process, text in zip(processes, texts, strict=True)]


OF_TORCH = re.compile(r"\[[EWIF]\d{4} |Exception raised from |frame #\d+: |<omitting python frames>|$")
"""How each line of a message of torch's C++ begins: its head, then where it was raised (torch 2.15), and an empty line at the end."""


def lines(ended: list[Ended]) -> list[str]:
    """All stderr lines of all ranks, without those of torch's C++."""
    return [line for one in ended for line in one.err.splitlines() if not OF_TORCH.match(line)]


def test_messages_of_torch_are_left_out_whole() -> None:
    """A rank whose store goes away while it waits there gets such a message before its own line."""
    message = (
        "[W1129 11:42:55.320532911 TCPStore.cpp:138] [c10d] recvValueWithTimeout failed on SocketImpl(fd=8): Connection reset by peer\n"
        "Exception raised from recvBytes at /torch/csrc/distributed/c10d/Utils.hpp:783 (most recent call first):\n"
        "frame #0: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7f04c035c13d in libc10.so)\n"
        "<omitting python frames>\n"
        "frame #41: _start + 0x21 (0x556fcd33c081 in python)\n\n"
    )
    own = "error: rank 0 does not answer any more\n"
    assert lines([Ended(1, "", message + own), Ended(1, "", message)]) == [own.strip()]


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("where", ["before", "build", "training"])
def test_a_mistake_on_one_rank_ends_all_with_its_status_and_is_told_once(tmp_path: Path, where: str, fails: int) -> None:
    began = time.time()
    ended = run(tmp_path, 2, fails, where, "mistake")
    assert [one.status for one in ended] == [2, 2], ended
    assert lines(ended) == ["error: --data-path words is not on this node"]
    assert time.time() - max(began, ended[fails].when("failing")) < SOON


def test_a_bug_on_one_rank_ends_all_and_its_traceback_stands_once(tmp_path: Path) -> None:
    ended = run(tmp_path, 3, 1, "training", "bug")
    assert [one.status for one in ended] == [1, 1, 1], ended
    assert "KeyError: 'a bug'" in ended[1].err and lines([ended[0], ended[2]]) == []


@pytest.mark.parametrize("fails", [1, 2])
def test_a_killed_rank_is_named_by_one_of_the_others(tmp_path: Path, fails: int) -> None:
    began = time.time()
    ended = run(tmp_path, 3, fails, "training", "kill")
    assert ended[fails].status == -signal.SIGKILL and {one.status for one in ended} == {1, -signal.SIGKILL}, ended
    [line] = lines(ended)
    assert line.startswith(
        f"error: rank {fails} at {socket.gethostname()} does not answer any more (killed? out of memory?)"
    ), line
    assert time.time() - max(began, ended[fails].when("failing")) < SOON


def test_a_rank_that_sees_the_failure_and_ends_is_not_listed_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may do so between the two looks of the rank that asks: at the store, and at the process."""
    store = dist.HashStore()
    launch = Launch(rank=0, world_size=3, local_rank=0, address="localhost", port=1, agent_hosts=False, attempt="0")
    connection: Any = SimpleNamespace(store=store, launch=launch)

    def ends(_: object, rank: int) -> bool:
        if rank == 2:
            store.set("seen/2", "")
        return False

    monkeypatch.setattr(failure, "lives", ends)
    assert failure._silent(connection, 0.0) == [1]


def starving() -> None:
    """The program of three ranks: rank 1 stops rank 2 for longer than anybody waits for a silent rank, and is killed."""
    with distributed(timedelta(minutes=5), timedelta(seconds=60)):
        pids: list[int] = [0] * 3
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == 1:
            command = f"kill -STOP {pids[2]}; sleep {6 * failure.POLL_SECONDS}; kill -CONT {pids[2]}"
            subprocess.Popen(["sh", "-c", command], start_new_session=True)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))


@pytest.mark.long
def test_a_survivor_that_is_slow_is_not_listed_as_dead_and_finds_the_store(tmp_path: Path) -> None:
    ended = launch(tmp_path, 3, 30.0, dict.fromkeys(range(3), (starving,)))
    assert [one.status for one in ended] == [1, -signal.SIGKILL, 1], ended
    [line] = lines(ended)
    assert line.startswith(f"error: rank 1 at {socket.gethostname()} does not answer any more"), line


def test_the_death_of_the_rank_that_hosts_the_store_ends_the_others(tmp_path: Path) -> None:
    ended = run(tmp_path, 3, 0, "build", "kill")
    assert [one.status for one in ended] == [-signal.SIGKILL, 1, 1], ended
    [line] = lines(ended)
    assert line.startswith("error: rank 0 at 127.0.0.1:") and "does not answer any more" in line


def test_who_does_not_join_is_named_and_the_wait_ends(tmp_path: Path) -> None:
    ended = run(tmp_path, 4, 3, "before", "kill", come=[0, 2, 3], join=5, report_every=1)
    assert [one.status for one in ended] == [1, 1, -signal.SIGKILL], ended
    printed = lines(ended)
    assert printed[0] == "waiting for ranks 1, 3 of 4 for 1 s" and printed[-1].startswith(
        "error: ranks 1, 3 of 4 did not join within"
    ), printed
    assert sum(line.startswith("error: ") for line in printed) == 1


def test_a_store_that_nobody_hosts_is_waited_for_and_then_named(tmp_path: Path) -> None:
    [ended] = run(tmp_path, 2, 0, "before", "mistake", come=[1], join=2, report_every=1)
    assert ended.status == 1 and "error: rank 0 did not join within --rendezvous-timeout-minutes" in ended.err, ended


@pytest.mark.parametrize(
    "other_flags, expected",
    [
        (dict(train_iters=3), "--train-iters is 2 on rank 0 and 3 on rank 1"),
        (dict(save="save"), "whether --save is given is False on rank 0"),
        (dict(valid_share=0.1), "--valid-share is 0.0 on rank 0 and 0.1 on rank 1"),
    ],
)
def test_ranks_with_different_flags_are_refused_and_do_not_wait_for_each_other(
    tmp_path: Path, other_flags: dict[str, Any], expected: str
) -> None:
    if "save" in other_flags:
        other_flags = dict(save=tmp_path / "save")
    data = write_tokens(tmp_path / "words")
    words = [argv(**(dict(data_path=data, train_iters=2) | flags)) for flags in ({}, other_flags)]
    ended = launch(tmp_path, 2, 30.0, {rank: (pretrain.main, words[rank]) for rank in range(2)})
    assert [one.status for one in ended] == [2, 2] and not (tmp_path / "save").exists(), ended
    [line] = [line for line in lines(ended) if line.startswith("error: ")]
    assert expected in line, line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_the_wait_for_the_other_ranks(tmp_path: Path, rank: int) -> None:
    words = argv(
        data_path=write_tokens(tmp_path / "words"), train_iters=2, outcome_file=tmp_path / "outcome", exit_signal_handler=True
    )
    began = time.time()
    [ended] = launch(tmp_path, 2, 30.0, {rank: (told_to_leave, words)})
    assert (ended.status, lines([ended])) == (
        0,
        [f"left before it began: SIGTERM received while waiting for rank {1 - rank} of 2"],
    )
    assert (tmp_path / "outcome").read_text().startswith("left - ") and time.time() - began < 30


def told_to_leave(words: list[str]) -> int:
    """Run the program, which gets SIGTERM as soon as it waits for the other ranks."""

    def meet(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return rendezvous.meet(*arguments)

    with mock.patch("megatron_salt.parallel.launch.meet", meet):
        return pretrain.main(words)


def test_a_run_that_ends_well_says_nothing(tmp_path: Path) -> None:
    ended = run(tmp_path, 3, 9, "nowhere", "mistake")
    assert [(one.status, one.err) for one in ended] == [(0, "")] * 3, ended
    assert all(one.when("left") for one in ended)


def test_ranks_that_torchrun_started_may_join_a_second_time(tmp_path: Path) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended = launch(tmp_path, 2, 30.0, dict.fromkeys(range(2), (twice,)), agent)
    assert [(one.status, one.err) for one in ended] == [(0, "")] * 2, ended


def twice() -> None:
    """The program of a rank that makes two runs, one after the other."""
    for _ in range(2):
        work(False, "", "", 60.0)


def test_a_run_whose_data_one_rank_does_not_see_is_refused_on_all_and_told_once(tmp_path: Path) -> None:
    data, outcome = write_tokens(tmp_path / "words"), tmp_path / "outcome"
    words = [argv(data_path=path, train_iters=2, outcome_file=outcome) for path in (data, tmp_path / "nowhere")]
    ended = launch(tmp_path, 2, 30.0, {rank: (pretrain.main, words[rank]) for rank in range(2)})
    assert [one.status for one in ended] == [2, 2], ended
    [line] = lines(ended)
    assert line.startswith("error: ") and f"{tmp_path}/nowhere" in line
    assert outcome.read_text().startswith("refused - ")
