"""Stage: a run is killed while it writes a checkpoint in the background, and goes on from the last whole one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_salt.checkpoint import save_directory
from tests.gpu.stages.runner import NotHereError, Report, Setting
from tests.gpu.stages.small_model import run_program
from tests.support.program import argv, losses, tensors, write_tokens

ROOT = Path(__file__).resolve().parents[3]
STEPS, INTERVAL = 8, 2
MODEL: dict[str, Any] = dict(num_layers=4, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8)
"""Some hundred MB a checkpoint, so that a write takes long enough to be hit."""
TINY: dict[str, Any] = dict(num_layers=2, hidden_size=128, ffn_hidden_size=256)


def killed_and_resumed(setting: Setting, report: Report) -> None:
    """Twice: kill -9 in a write, resume in this process. Hashes of the last state beside those of an uninterrupted run."""
    if setting.device == "cuda" and not setting.timed:
        raise NotHereError("a process of its own has no virtual GPU")
    data = write_tokens(setting.scratch / "words-to-kill", windows=200)
    flags = dict(data_path=data, train_iters=STEPS, save_interval=INTERVAL, async_save=True, bf16=True, transformer_impl="torch",
                 device=setting.device, **(TINY if setting.tiny else MODEL))  # fmt: skip
    whole = setting.scratch / "uninterrupted"
    run_program(argv(**flags, save=whole))
    rows = []
    for number in range(1 if setting.tiny else 2):
        save = setting.scratch / f"killed-{number}"
        in_a_write = kill_in_a_write(argv(**flags, save=save), 60 * setting.patience)
        left = sorted(save_directory.whole_checkpoints(save))
        run_program(argv(**flags, save=save, load=save))
        rows.append({"killed in a write": in_a_write, "whole checkpoints left": left,
                     "same bits as uninterrupted": tensors(save, STEPS) == tensors(whole, STEPS)})  # fmt: skip
        report.compare(f"losses, kill {number + 1}", list(losses(save).values()), list(losses(whole).values()), 5e-3)
        report.require(in_a_write, f"kill {number + 1} found no write to interrupt")
        if setting.device == "cpu":
            report.require(bool(rows[-1]["same bits as uninterrupted"]), f"kill {number + 1}: another state than uninterrupted")
    report.note(kills=rows)


def kill_in_a_write(words: list[str], seconds: float) -> bool:
    """Run the program in a process of its own, and kill that while its second checkpoint is being written. Returns whether it was."""
    save = Path(words[words.index("--save") + 1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_salt.pretrain", *words], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    partial, deadline = save_directory.partial_of(save, 2 * INTERVAL), time.monotonic() + seconds
    try:
        while process.poll() is None and not partial.exists():
            assert time.monotonic() < deadline, f"no second checkpoint was begun in {seconds:.0f} s"
            time.sleep(0.001)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said[-2000:]
    return partial.exists()
