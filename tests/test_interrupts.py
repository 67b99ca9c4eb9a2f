"""Ctrl-C ends a program with one line and status 130, also while its modules are imported, and while it writes a checkpoint."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.program import alone, argv, checkpoints, write_tokens
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[1]


def heed_interrupts() -> None:
    """In a child: SIGINT ends it. Python ignores the signal where its parent did, as background jobs of a shell do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


CONSOLE_SCRIPT = "import sys\nfrom megatron_salt.pretrain import main\nsys.exit(main())\n"


@pytest.mark.parametrize("module", ["tyro", "torch"])  # before the program's own first line, and after it
@pytest.mark.parametrize("start", ["python -m", "console script", "tools/"])
def test_an_interrupt_during_an_import_is_one_line(tmp_path: Path, start: str, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    script = tmp_path / "bin/salt-pretrain"
    script.parent.mkdir()
    script.write_text(CONSOLE_SCRIPT)
    flags = ["--train-iters", "3", "--data-path", str(tmp_path / "words"), "--lr-warmup-iters", "0", "--eval-iters", "0"]
    words = {
        "python -m": ["-m", "megatron_salt.pretrain", *flags],
        "console script": [str(script), *flags],
        "tools/": [str(ROOT / "tools/score_data.py"), "--teacher-load", ".", "--data-path", "words", "--output", "scores"],
    }[start]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    with subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, preexec_fn=heed_interrupts) as program:  # fmt: skip
        try:
            assert program.stdout is not None and program.stdout.readline() == "importing\n"
            program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=60)
        finally:
            program.kill()
    assert (program.returncode, errors) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "command", ["import megatron_salt", "import sys; sys.argv[0] = '/usr/bin/salt-score'; import megatron_salt"]
)
def test_a_process_that_only_imports_the_package_keeps_its_handler(command: str) -> None:
    """The second is like a worker of multiprocessing, which has the sys.argv of the program that started it."""
    program = f"import signal; {command}; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, preexec_fn=heed_interrupts)


def write_slowly(words: list[str], directory: Path) -> None:
    """The program, with a process of its saves that writes for a minute. In a process of its own."""
    import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def slow(*_: object, **__: object) -> None:
        (directory / "writing").touch()
        time.sleep(60)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    FileSystemWriterAsync.write_preloaded_data = staticmethod(slow)
    alone(words, 0, 1, str(directory / "rendezvous"), directory / "output")


@pytest.mark.parametrize(
    "number, async_save, status, told",
    [
        (signal.SIGINT, True, 130, 1),
        pytest.param(signal.SIGINT, False, 130, 1, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, True, -signal.SIGTERM, 0, marks=pytest.mark.long),
        (signal.SIGKILL, True, -signal.SIGKILL, 0),
    ],
)
def test_a_signal_during_a_save_ends_all_its_processes_without_a_traceback_and_publishes_nothing(
    tmp_path: Path, number: signal.Signals, async_save: bool, status: int, told: int
) -> None:
    """SIGINT goes to all processes, as from a terminal; the others to the program alone, and its writers must not outlive it."""
    flags = dict(data_path=write_tokens(tmp_path / "words"), train_iters=4000, save=tmp_path / "save", save_interval=2)
    run_ranks(1, os.getpid)  # there is a fork server now
    program = multiprocessing.get_context("forkserver").Process(
        target=write_slowly, args=(argv(**flags, async_save=async_save), tmp_path)
    )
    program.start()
    assert program.pid is not None
    try:
        wait(lambda: (tmp_path / "writing").exists())
        (os.killpg if number == signal.SIGINT else os.kill)(program.pid, number)
        program.join(30)
        assert program.exitcode == status
        wait(lambda: not processes_of(program.pid))
    finally:
        for left in processes_of(program.pid):
            os.kill(left, signal.SIGKILL)
    output = (tmp_path / "output").read_text()
    assert output.count("interrupted\n") == told and not re.search("Traceback|Process|Error", output), output
    assert checkpoints(tmp_path / "save") == []


def processes_of(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


def wait(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
