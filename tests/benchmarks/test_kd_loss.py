"""benchmarks/kd_loss.py: its branch for GPUs under virtual CUDA, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import head_on_gpu, kd_loss

ROOT = Path(__file__).parents[2]


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        kd_loss.main(["--device", "cuda"])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "kd_loss.py: --device cuda: this process sees no GPU\n")


@pytest.mark.long
def test_on_a_gpu_all_forms_reach_the_same_numbers() -> None:
    """A rival that is not installed is a line. Times are those of the interpreter, so no goal is asked for."""
    pytest.importorskip("triton", reason="needs Triton")
    sizes = "--vocabularies 1000 --tokens 16 --hidden-size 16 --teacher-hidden-size 8 --chunks 4 8 --pairs 1"
    rivals = "--rivals full chunks plain mcore liger"
    code = "import sys; sys.modules['liger_kernel'] = None; from tests.benchmarks import kd_loss_on_virtual_cuda as test"
    program = [sys.executable, "-c", f"{code}; test.main(sys.argv[1:])"]
    done = subprocess.run([*program, *sizes.split(), *rivals.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    measured = [line.split()[0] for line in lines if " TFLOP/s " in line]
    assert measured == ["kd_chunk4", "kd_chunk8", "full", "chunks", "alone_chunk4", "alone_chunk8", "plain", "mcore"]
    assert any(re.fullmatch(r" +liger +liger_kernel.* not installed", line) for line in lines)
    assert [line.split("_over_")[1].split()[0] for line in lines if "_over_" in line] == ["full", "chunks", "plain", "mcore"]
    assert sum(line.startswith("RESULT name=tflops_") for line in lines) == 2
    assert json.loads(lines[-1]) == []  # faults that a GPU would not forgive


def test_a_rival_that_cannot_run_is_a_line() -> None:
    assert (
        head_on_gpu.why_not(ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel"))
        == "liger_kernel not installed"
    )
    assert head_on_gpu.why_not(torch.OutOfMemoryError("CUDA out of memory")) == "does not fit into this GPU's memory"
    assert head_on_gpu.why_not(RuntimeError("no compiler\nat all")) == "RuntimeError: no compiler"


def test_flops_are_those_of_the_products() -> None:
    setting = kd_loss.Setting(
        vocabulary_size=1000, dtype="bf16", tokens=10, temperature=1.0, hidden_size=30, teacher_hidden_size=20, chunk_tokens=5
    )
    assert head_on_gpu.tflops(setting, "alone", 1.0) == pytest.approx(3 * 2 * 1000 * 30 * 10 / 1e-3 / 1e12)
    assert head_on_gpu.tflops(setting, "kd", 1.0) == pytest.approx((3 * 30 + 20) * 2 * 1000 * 10 / 1e-3 / 1e12)
