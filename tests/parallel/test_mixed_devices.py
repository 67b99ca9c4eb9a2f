"""Ranks that do not compute on the same kind of device, or share one GPU, are refused before their first collective."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_salt import pretrain
from megatron_salt.errors import this_host
from megatron_salt.parallel.launch import distributed
from tests.parallel.test_rendezvous import launch, lines
from tests.support.program import argv, write_tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that some ranks have GPUs")


def join(host: str, gpu: str | None, device: str) -> None:
    """One rank: on a GPU that has this identity, or on the CPU."""
    with mock.patch.dict("os.environ", {"SLURMD_NODENAME": host}):
        if gpu is None:
            with distributed(timedelta(minutes=5), device=device):
                return
        answers = dict(
            is_available=lambda: True, device_count=lambda: 1, set_device=lambda _: None, synchronize=lambda: None,
            get_device_properties=lambda _: SimpleNamespace(uuid=gpu),
        )  # fmt: skip
        with mock.patch.multiple(torch.cuda, **answers), distributed(timedelta(minutes=5), device=device):
            raise AssertionError("ranks that must not have joined")


@pytest.mark.parametrize("on_cpu", [0, 1])
def test_a_rank_without_a_gpu_among_ranks_with_one_ends_all_at_once_and_its_host_is_named(tmp_path: Path, on_cpu: int) -> None:
    began = time.time()
    calls = {rank: (join, f"node{rank}", None if rank == on_cpu else f"GPU-{rank}", "auto") for rank in range(2)}
    ended = launch(tmp_path, 2, 30.0, calls)
    assert [one.status for one in ended] == [5, 5] and time.time() - began < 60, ended
    [line] = lines(ended)
    assert line.startswith(
        f"error: host node{on_cpu} cannot be used: rank {on_cpu} sees no GPU there and would use gloo, while rank "
    )
    assert f"rank {1 - on_cpu} at node{1 - on_cpu} has a GPU" in line


def fail_in_the_middle(fails: bool) -> None:
    """One rank: in the middle of a run its GPU may fail."""
    with distributed(timedelta(minutes=5)):
        dist.all_reduce(torch.ones(1))
        if fails:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nFor debugging ...")
        dist.all_reduce(torch.ones(1))


def test_a_gpu_that_fails_in_the_middle_of_a_run_ends_all_ranks_with_the_status_of_a_machine(tmp_path: Path) -> None:
    ended = launch(tmp_path, 2, 30.0, {rank: (fail_in_the_middle, rank == 1) for rank in range(2)})
    assert [one.status for one in ended] == [5, 5], ended
    assert lines(ended) == [
        f"error: host {this_host()} cannot be used: a GPU failed: CUDA error: uncorrectable ECC error encountered"
    ]


def test_ranks_that_share_their_only_gpu_are_refused(tmp_path: Path) -> None:
    ended = launch(tmp_path, 2, 30.0, dict.fromkeys(range(2), (join, "node7", "GPU-0", "cuda")))
    assert [one.status for one in ended] == [2, 2], ended
    [line] = lines(ended)
    assert "are shown the same GPU of node7, GPU-0: start one rank a GPU" in line


def test_ranks_that_were_told_different_devices_are_refused(tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "words")
    words = [argv(data_path=data, train_iters=2, device=device) for device in ("auto", "cpu")]
    ended = launch(tmp_path, 2, 30.0, {rank: (pretrain.main, words[rank]) for rank in range(2)})
    assert [one.status for one in ended] == [2, 2], ended
    [line] = lines(ended)
    assert line.startswith("error: --device is ") and "rank 0 at" in line and "rank 1 at" in line
