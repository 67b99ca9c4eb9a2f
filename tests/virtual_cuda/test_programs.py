"""Other programs under virtual CUDA: scoring, and the command that runs pretrain so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.checks import assert_same_scores
from tests.support import scoring
from tests.support.program import argv
from tests.support.virtual_cuda.ranks import run_virtual
from tests.virtual_cuda.runs import data, teacher

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.parametrize("world_size, dtype", [(1, "bfloat16"), (2, "float32")])
def test_scoring_mixes_no_devices_and_scores_as_on_the_cpu(tmp_path: Path, world_size: int, dtype: str) -> None:
    flags = dict(teacher_load=teacher(), data_path=data(), dtype=dtype, tensor_model_parallel_size=world_size)
    ranks = run_virtual(world_size, scoring.main, scoring.argv(**flags, output=tmp_path / "virtual"))
    assert [rank.result.status for rank in ranks] == [0] * world_size, [rank.result.err for rank in ranks]
    for rank in ranks:
        assert rank.report.faults == [], rank.report.text()
        assert any(name.startswith("megatron_salt::") for name in rank.report.kernels["start"])
    scoring.score(world_size, **flags, output=tmp_path / "cpu")
    assert_same_scores(tmp_path / "virtual", tmp_path / "cpu")


@pytest.mark.long
def test_one_command_runs_pretrain_and_prints_what_was_recorded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.virtual_cuda", "--"]
    words = argv(data_path=data(), train_iters=2, transformer_impl="torch", device="cuda", save=tmp_path / "run")
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ended = subprocess.run(command + words, cwd=ROOT, env=alone, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "on virtual H200 (compute capability 9.0)" in ended.stderr
    assert "\nfaults: 0\nwaits of the host: " in ended.stderr, ended.stderr
    assert re.search(r"^ +1 step 2 +item +megatron.*clip_grads.py:\d+ < ", ended.stderr, re.MULTILINE), ended.stderr
    kernels = re.search(r"^ +(\d+) +[\d.]+ step 2$", ended.stderr, re.MULTILINE)
    assert kernels is not None and int(kernels[1]) > 500, ended.stderr
