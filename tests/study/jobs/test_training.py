"""Real programs under a study: a training run that is stopped and goes on, and the ranks of torchrun."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from megatron_salt.study import execute
from megatron_salt.study.execute import run_jobs
from megatron_salt.study.job import Job
from megatron_salt.study.jobs.outcome import read_outcome
from megatron_salt.study.read_runs import ExpectedRun, read_run
from tests.study.jobs.small_jobs import wait_for
from tests.support.program import argv, entries, numbers, train, write_tokens

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "POLL_SECONDS", 0.05)


def stopped_when(there: Path, marker: str, job: Job, base: Path) -> tuple[int, str]:
    """A study that is told to leave when the file has the marker; its exit status and what it showed."""
    out = io.StringIO()

    def stop() -> None:
        try:
            wait_for(lambda: there.exists() and marker in there.read_text(), 120)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    status = run_jobs([job], base, 1, out=out)
    thread.join()
    return status, out.getvalue()


@pytest.mark.parametrize("steps", [pytest.param(120, marks=pytest.mark.full), 6])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, steps: int) -> None:
    """Stopped by a signal, which needs steps enough until it has arrived; or by itself after step 4."""
    save = tmp_path / "study/salt"
    settings = dict(data_path=write_tokens(tmp_path / "words", windows=400), train_iters=steps, eval_iters=1, eval_interval=steps // 2,
                    valid_share=0.1, save_interval=1000, seed=3)  # fmt: skip
    flags = argv(**settings, save=save, load=save, exit_signal_handler=True, exit_interval=4 if steps == 6 else None)
    job = Job(name="salt-seed_3", kind="run", command=("-m", "megatron_salt.pretrain", *flags), ranks=1, directory=save, needs=(),
              arm="salt", seed=3, steps=steps)  # fmt: skip
    planned = ExpectedRun(arm="salt", kind="salt", seed=3, settings={}, directory=save, steps=steps)

    if steps == 6:
        out = io.StringIO()
        assert (
            run_jobs([job], tmp_path / "study", 1, out=out) == 1
            and "step 4 is a multiple of --exit-interval 4" in out.getvalue()
        )
    else:
        status, shown = stopped_when(save / "train.jsonl", '"step": 5,', job, tmp_path / "study")
        assert status == 128 + signal.SIGTERM and "SIGTERM received" in shown and "the same command goes on" in shown
    left = read_outcome(save / "outcome.txt")
    assert left is not None and (left.word, left.step) == ("left", len(entries(save)))
    assert left.step < steps and read_run(planned).state == "waiting"
    out = io.StringIO()
    assert run_jobs([job], tmp_path / "study", 1, out=out) == 0
    found = read_run(planned)
    assert (found.state, found.reason) == ("finished", "") and found.config is not None and found.config.training.seed == 3
    assert found.curve is not None and found.curve.final is not None
    assert f"salt-seed_3: done, step {steps}/{steps}, held-out loss {found.curve.final:.4f}" in out.getvalue()
    train(**settings, save=tmp_path / "whole")
    assert numbers(save) == numbers(tmp_path / "whole")


RANK = """
import os, pathlib, signal, sys, time
base = pathlib.Path(sys.argv[1])
def save(number, frame):
    time.sleep(0.5)
    (base / f"saved-{os.environ['RANK']}").touch()
    sys.exit(3)  # as a tool whose output is not whole
signal.signal(signal.SIGTERM, save)
with open(base / "pids", "a") as file:
    file.write(f"{os.getpid()} of {os.environ['WORLD_SIZE']}\\n")
while True:
    time.sleep(0.05)
"""


def test_the_ranks_of_torchrun_save_and_none_stays(tmp_path: Path) -> None:
    program, pids = tmp_path / "rank.py", tmp_path / "pids"
    program.write_text(RANK)
    job = Job(name="score", kind="score", command=(str(program), str(tmp_path)), ranks=2, directory=tmp_path / "job", needs=())
    status, shown = stopped_when(pids, "of 2\n", job, tmp_path / "study")
    assert status == 128 + signal.SIGTERM and "1 left" in shown
    wait_for(lambda: not any(psutil.pid_exists(int(line.split()[0])) for line in pids.read_text().splitlines()))
    assert "death signal" not in job.log.read_text()  # torchrun itself got none: it would kill its ranks after 30 s
    assert len(list(tmp_path.glob("saved-*"))) == len(pids.read_text().splitlines())
