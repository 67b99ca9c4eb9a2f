"""Processes join with a launcher and without one, give up on a rank that does not come, and draw the random numbers they should."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import megatron_salt.parallel.cpu  # noqa: F401  (before megatron)
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

PROGRAM = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from megatron_salt.parallel.launch import distributed
with distributed(timedelta(seconds=float(sys.argv[1]))):
    total = torch.ones(1)
    dist.all_reduce(total)
    print(f"ranks {int(total)}\\n", end="", flush=True)
    if dist.get_rank() == 1:
        time.sleep(90)
    dist.all_reduce(total)
assert not dist.is_initialized()
print("left", flush=True)
"""


def start(tmp_path: Path, timeout: float, *launcher: str) -> subprocess.CompletedProcess:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(timeout)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.long
def test_without_a_launcher_a_process_is_a_world_of_one(tmp_path):
    done = start(tmp_path, 60)
    assert done.returncode == 0 and done.stdout.split() == ["ranks", "1", "left"], done.stderr


@pytest.mark.long
def test_under_torchrun_a_rank_that_does_not_come_ends_the_run_after_the_timeout(tmp_path):
    """Instead of the half hour that torch would wait."""
    started = time.monotonic()
    done = start(tmp_path, 3, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert time.monotonic() - started < 90
    assert done.returncode != 0 and sorted(done.stdout.splitlines()) == ["ranks 2"] * 2 and "imed out" in done.stderr


def draws(layout: Layout, seed: int) -> tuple[float, float]:
    """A random number outside and one inside the tensor-parallel tracker."""
    mesh = make_student_mesh(layout)
    seed_everything(seed, mesh)
    outside = float(torch.rand(()))
    with get_cuda_rng_tracker().fork():
        return outside, float(torch.rand(()))


def test_seeds_differ_by_stage_and_inside_the_tracker_by_tensor_parallel_rank():
    layout = Layout(tensor=2, pipeline=2)
    ranks = run_ranks(4, draws, layout, 5)
    assert [ranks.index(rank) for rank in ranks] == [0, 1, 2, 3]
    outside, inside = zip(*ranks, strict=True)
    assert outside[0] == outside[1] and outside[2] == outside[3] and len(set(outside)) == 2
    assert len(set(inside)) == 4 and not set(inside) & set(outside)
    assert run_ranks(4, draws, layout, 5) == ranks != run_ranks(4, draws, layout, 6)


def test_replicas_start_alike():
    first, second = run_ranks(2, draws, Layout(data=2), 5)
    assert first == second
