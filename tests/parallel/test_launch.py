"""Processes join with and without a launcher, stop waiting for a missing rank, and draw the right random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_salt.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.model.gpt import transformer_config
from megatron_salt.parallel.hardware import COMPILE_WORKERS, DETERMINISTIC, Hardware, ask_for_determinism, bound_compile_workers
from megatron_salt.parallel.launch import (
    choose_deterministic_operations,
    describe,
    find_hardware,
    seed_everything,
)
from megatron_salt.parallel.layout import Layout, student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.pretrain import prepare_libraries
from tests.support.ranks import run_ranks

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
    """torch itself would wait for half an hour."""
    started = time.monotonic()
    done = start(tmp_path, 3, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert time.monotonic() - started < 90
    assert done.returncode != 0 and sorted(done.stdout.splitlines()) == ["ranks 2"] * 2 and "imed out" in done.stderr


def draws(layout: Layout, seed: int) -> tuple[float, float]:
    """A random number outside the tensor-parallel tracker, and one inside it."""
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


def test_each_process_binds_the_gpu_of_its_local_rank_and_adds_parts_of_products_in_float32(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = True  # torch's default
    gpus = dict(is_available=lambda: True, device_count=lambda: 4, get_device_capability=lambda: (9, 0))
    with mock.patch.multiple(torch.cuda, **gpus, set_device=mock.DEFAULT, synchronize=mock.DEFAULT) as patched:
        assert find_hardware().capability == (9, 0)
        patched["set_device"].assert_called_once_with(3)
        assert products.allow_bf16_reduced_precision_reduction is False
    assert find_hardware().capability is None


def described(hardware: Hardware) -> str:
    with (
        mock.patch.multiple(torch.cuda, get_device_name=lambda: "H100"),
        mock.patch("torch.cuda.nccl.version", return_value=(2, 30, 7)),
    ):
        return describe(hardware)


def test_what_the_run_computes_on_is_told(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    [on_gpu] = run_ranks(1, described, Hardware((9, 0), (13, 0), (2, 20, 2)))
    words = ("H100", "9.0", "one a rank", "2.30.7", "Transformer Engine 2.20.2", "CUDA_DEVICE_MAX_CONNECTIONS", "pinned memory")
    assert [word for word in words if word not in on_gpu] == []
    [on_cpu] = run_ranks(1, described, Hardware(None, None, None))
    assert on_cpu == f"on the CPU: gloo, torch {torch.__version__}"


@pytest.fixture
def unset(monkeypatch):
    """None of the variables is set, and what a test sets is undone."""
    for name in (*DETERMINISTIC, COMPILE_WORKERS):
        monkeypatch.setenv(name, "")  # remembers what was there
        monkeypatch.delenv(name)
    return monkeypatch


def test_deterministic_sets_what_is_unset_and_refuses_another_value_by_name(unset):
    ask_for_determinism()
    assert {name: os.environ[name] for name in DETERMINISTIC} == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }
    unset.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    ask_for_determinism()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    unset.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(UserError, match="--deterministic needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, and it is 1"):
        ask_for_determinism()


def test_on_the_cpu_deterministic_asks_for_no_variables(unset):
    unset.setenv("CUDA_VISIBLE_DEVICES", "")
    unset.setenv("NCCL_ALGO", "Tree")
    on_cpu = RunConfig(training=TrainingConfig(deterministic=True), parallel=ParallelConfig(device="cpu"))
    prepare_libraries(on_cpu, student_layout(on_cpu.parallel, 1))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(UserError, match="--deterministic needs NCCL_ALGO=Ring, and it is Tree"):
        prepare_libraries(replace(on_cpu, parallel=ParallelConfig(device="cuda")), student_layout(on_cpu.parallel, 1))


def test_on_a_gpu_deterministic_turns_torchs_operations_and_megatron_cores_and_on_a_cpu_nothing():
    def mode() -> bool:
        return transformer_config(ModelConfig(), ParallelConfig(), torch.float32).deterministic_mode

    assert "changes nothing on a CPU" in choose_deterministic_operations() and not mode()
    try:
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            choose_deterministic_operations()
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        assert mode()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_rank_compiles_in_four_processes_unless_it_is_told_otherwise(unset):
    bound_compile_workers()
    code = "import torch._inductor.config as config; print(config.compile_threads)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ).stdout
    assert shown == "4\n"
    unset.setenv(COMPILE_WORKERS, "1")
    bound_compile_workers()
    assert os.environ[COMPILE_WORKERS] == "1"
