"""The test harness for ranks: results in the order of ranks, each kind of failure is told apart, calls leave nothing behind."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.config import ParallelConfig
from megatron_salt.errors import UserError
from tests.support import small
from tests.support.ranks import RankError, run_ranks


def total_of_ranks(offset: int) -> tuple[int, int, torch.Tensor]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), os.getpid(), value


def first_rank_raises(everyone: bool) -> None:
    if everyone or dist.get_rank() == 0:
        raise UserError(f"--flag is wrong on rank {dist.get_rank()}")
    dist.barrier()


def second_rank_never_comes() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def second_rank_dies(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exit code 7":
            os._exit(7)
        os.kill(os.getpid(), getattr(signal, how.removeprefix("signal ")))
    dist.barrier()


def leaves_a_mess() -> None:
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    parallel_state.get_global_memory_buffer()
    init_num_microbatches_calculator(0, None, 4, 1, 1)
    initialize_rerun_state_machine()
    model_parallel_cuda_manual_seed(1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["LEFT_BEHIND"] = "1"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger("megatron_salt").setLevel(logging.INFO)


def what_is_there() -> dict[str, object]:
    """All state that a call could find from an earlier call."""
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random as megatron_random

    return {
        "groups": {name: repr(value) for name, value in vars(parallel_state).items() if re.match("_[A-Za-z]", name)},
        "microbatches": num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None,
        "rerun": rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE is None,
        "tracker": megatron_random._CUDA_RNG_STATE_TRACKER is None,
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "environment": os.environ.get("LEFT_BEHIND"),
        "handler": str(signal.getsignal(signal.SIGTERM)),
        "log level": logging.getLogger("megatron_salt").level,
        "random": (random.random(), torch.rand(1).item()),
        "world groups": len(dist.distributed_c10d._world.pg_map),
    }


def threads_and_names() -> tuple[int, str, str]:
    return torch.get_num_threads(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def train_a_little() -> None:
    small.train(small.Case(parallel=ParallelConfig(use_distributed_optimizer=True)), dist.get_world_size(), steps=1)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def not_picklable() -> object:
    return lambda: None


def test_results_come_back_by_rank_and_processes_are_used_again():
    small, large = run_ranks(2, total_of_ranks, 1), run_ranks(4, total_of_ranks, 10)
    assert [rank for rank, _, _ in large] == [0, 1, 2, 3]
    assert [value.item() for _, _, value in small] == [1 + 2] * 2
    assert [value.item() for _, _, value in large] == [10 + 11 + 12 + 13] * 4
    assert [pid for _, pid, _ in small] == [pid for _, pid, _ in large[:2]]


def test_each_rank_has_one_thread_and_knows_its_place():
    assert run_ranks(2, threads_and_names) == [(1, "0", "2"), (1, "1", "2")]


def test_an_exception_of_every_rank_is_raised_and_the_pool_lives_on():
    pids = [pid for _, pid, _ in run_ranks(2, total_of_ranks, 0)]
    with pytest.raises(RankError, match="failed on rank [01], [01] of 2") as failure:
        run_ranks(2, first_rank_raises, True)
    assert isinstance(failure.value.__cause__, UserError)
    assert "in first_rank_raises" in str(failure.value)
    assert "--flag is wrong on rank 0" in str(failure.value) and "--flag is wrong on rank 1" in str(failure.value)
    assert [pid for _, pid, _ in run_ranks(2, total_of_ranks, 0)] == pids


def test_when_one_rank_raises_the_ranks_that_wait_for_it_do_not_hold_things_up():
    start = time.monotonic()
    with pytest.raises(RankError, match="failed on rank 0 of 2") as failure:
        run_ranks(2, first_rank_raises, False)
    assert time.monotonic() - start < 20
    assert "rank 1 was still running" in str(failure.value) and "in barrier" in str(failure.value)
    assert len(run_ranks(2, total_of_ranks, 0)) == 2


@pytest.mark.long
def test_a_hang_ends_at_the_timeout_and_shows_every_stuck_rank():
    with pytest.raises(RankError, match="gave no answer in 3 s on rank 0, 1 of 2") as failure:
        run_ranks(2, second_rank_never_comes, timeout=3)
    assert str(failure.value).count("in second_rank_never_comes") == 2
    assert len(run_ranks(2, total_of_ranks, 0)) == 2


@pytest.mark.parametrize("how", ["exit code 7", "signal SIGSEGV", "signal SIGKILL"])
def test_a_dead_process_is_called_dead(how):
    with pytest.raises(RankError, match=f"rank 1: died with {how}"):
        run_ranks(2, second_rank_dies, how)
    assert len(run_ranks(2, total_of_ranks, 0)) == 2


def test_nothing_is_left_from_the_call_before():
    before = run_ranks(2, what_is_there)
    run_ranks(2, leaves_a_mess)
    assert run_ranks(2, what_is_there) == before


def test_no_process_group_outlives_its_call():
    before = run_ranks(2, num_threads)
    run_ranks(2, train_a_little)
    run_ranks(2, train_a_little)
    assert run_ranks(2, num_threads) == before


def test_a_result_that_does_not_pickle_is_an_error_with_its_rank():
    with pytest.raises(RankError, match="failed on rank 0 of 1"):
        run_ranks(1, not_picklable)
