"""Ctrl-C ends a program with one line and status 130, also while its modules are imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
