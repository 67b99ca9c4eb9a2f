"""The lock on --save: how a run ends that loses it, waits for it or cannot write it."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_salt.checkpoint import owner
from megatron_salt.checkpoint.owner import LOCK, acquire, myself
from megatron_salt.train import build
from tests.support.program import refused, run, the_error, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@contextlib.contextmanager
def taken_over_after_its_first_step(save: Path) -> Iterator[None]:
    """Another run takes --save over while this one trains. This one's beats are quick."""
    winners = []

    def rob() -> None:
        while not (save / "train.jsonl").exists() or '"step"' not in (save / "train.jsonl").read_text():
            time.sleep(0.01)
        winners.append(acquire(save, myself({}), take_over=True))

    thread = threading.Thread(target=rob, daemon=True)
    with mock.patch.object(build, "acquire", functools.partial(acquire, beat=0.02)):
        thread.start()
        yield
        thread.join()
    winners[0].check()
    winners[0].release()


def test_the_loser_of_a_takeover_leaves_within_a_step_though_no_save_is_due(tmp_path: Path, data: str) -> None:
    save, word = tmp_path / "run", tmp_path / "word"
    [ended] = run(within=functools.partial(taken_over_after_its_first_step, save), data_path=data, train_iters=100_000, save=save,
                  outcome_file=word)  # fmt: skip
    assert ended.status == 2 and "was taken over by process" in the_error(ended.err), ended.err
    assert word.read_text().startswith("refused - job") and not list(save.glob("iter_*"))


def test_a_signal_while_another_owner_is_watched_is_an_early_leave(tmp_path: Path, data: str) -> None:
    save, word = tmp_path / "run", tmp_path / "word"
    save.mkdir()
    elsewhere = replace(myself({}), host="there", machine="another")
    (save / LOCK).write_text(json.dumps({**asdict(elsewhere), "beat": "0" * 12}))
    [ended] = run(within=functools.partial(signalled, save), data_path=data, train_iters=2, save=save, exit_signal_handler=True,
                  outcome_file=word)  # fmt: skip
    assert ended.status == 0 and "left before the first step" in ended.err and "error" not in ended.err, ended.err
    assert word.read_text().startswith("left - job") and [path.name for path in save.iterdir()] == [LOCK]


@contextlib.contextmanager
def signalled(save: Path) -> Iterator[None]:
    """Send SIGTERM as soon as the run watches the owner of --save."""

    def watched(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return acquire(*arguments, **named)

    with mock.patch.object(build, "acquire", watched):
        yield


def test_a_full_disk_names_what_may_be_deleted(tmp_path: Path, data: str) -> None:
    save = tmp_path / "run"
    for name in ("iter_0000004.partial", "iter_0000002.deleting"):
        (save / name).mkdir(parents=True)
    message = refused(within=no_space, data_path=data, train_iters=2, save=save)
    assert f"--save {save} cannot be written" in message and "No space left" in message
    assert "deleted by hand: iter_0000002.deleting, iter_0000004.partial" in message


@contextlib.contextmanager
def no_space() -> Iterator[None]:
    with mock.patch.object(owner, "_write", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        yield
