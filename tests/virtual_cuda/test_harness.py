"""Virtual CUDA reports what it is there for: each law plants one thing, and it is reported with its file and line."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError
from tests.support.virtual_cuda.ranks import run_virtual
from tests.support.virtual_cuda.recorder import Report

GPU = "cuda"


def report_of(function: Callable[[], object], world_size: int = 1) -> Report:
    return run_virtual(world_size, function)[0].report


def is_at(where: str, function: Callable[..., object], line: int) -> bool:
    """Whether the innermost frame is that line of the function, 0 its `def`."""
    first = inspect.getsourcelines(function)[1]
    return where.split(" < ")[0] == f"tests/virtual_cuda/{Path(__file__).name}:{first + line}"


def mismatch() -> None:
    on_gpu = torch.ones(3, device=GPU)
    on_gpu + torch.ones(3)


def test_an_operator_that_mixes_devices_is_a_fault() -> None:
    [fault] = report_of(mismatch).faults
    assert fault.what == "aten::add.Tensor mixes devices: cuda [3], cpu [3]" and is_at(fault.where, mismatch, 2)


def a_number() -> None:
    torch.ones(3, device=GPU) * torch.tensor(2.0)
    torch.ones(3, device=GPU) * 2


def test_a_number_on_the_cpu_is_none() -> None:
    assert not report_of(a_number).faults


def a_number_that_is_written() -> None:
    total = torch.zeros(())
    total += torch.ones((), device=GPU)


def a_number_among_joined_tensors() -> None:
    torch.stack([torch.ones((), device=GPU), torch.zeros(())])


@pytest.mark.parametrize("function", [a_number_that_is_written, a_number_among_joined_tensors])
def test_a_number_on_the_cpu_that_is_written_or_joined_is_a_fault(function: Callable[[], None]) -> None:
    [fault] = report_of(function).faults
    assert "mixes devices" in fault.what


def cpu_collective() -> None:
    dist.all_reduce(torch.ones(3, device=GPU))
    dist.all_reduce(torch.ones(3))


def test_a_cpu_tensor_in_a_collective_of_the_device_is_a_fault() -> None:
    for rank in run_virtual(2, cpu_collective):
        [fault] = rank.report.faults
        assert fault.what == "c10d::allreduce_ of NCCL with a tensor of the CPU: cpu [3]" and is_at(
            fault.where, cpu_collective, 2
        )


def cpu_group() -> None:
    group = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(3), group=group)
    dist.all_reduce(torch.ones(3, device=GPU), group=group)


def test_a_group_of_gloo_takes_cpu_tensors_alone() -> None:
    [fault] = report_of(cpu_group).faults
    assert fault.what.startswith("c10d::allreduce_ of gloo with a tensor of the GPU") and is_at(fault.where, cpu_group, 3)


def waits() -> None:
    x = torch.arange(4.0, device=GPU)
    x[2].item()
    float(x.sum())
    x[x > 1]
    x.cpu()
    torch.tensor([1.0, 2.0], device=GPU)
    torch.ones(2).to(GPU)
    torch.ones(2).pin_memory().to(GPU)
    x.tolist()
    x.nonzero()
    torch.cuda.synchronize()
    torch.tensor([x[0], x[1]])
    if x.sum() > 0:
        torch.cuda.current_stream().record_event().synchronize()
    dist.all_gather_object([None], 1)


LINES_THAT_WAIT = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14]


def test_every_wait_of_the_host_is_told_with_its_line() -> None:
    syncs = report_of(waits).syncs
    own = [one for one in syncs if "test_harness.waits" in one.inside]
    lines = [int(one.where.split(" < ")[0].rpartition(":")[2]) - inspect.getsourcelines(waits)[1] for one in own]
    assert [line for line in lines if line < 15] == LINES_THAT_WAIT
    assert lines.count(15) >= 2, "objects travel through the device"


def no_waits() -> None:
    x = torch.zeros(4, device=GPU)
    x.copy_(torch.ones(4).pin_memory(), non_blocking=True)
    torch.ones(4).pin_memory().to(GPU, non_blocking=True)
    x[x > 1] = 0.0
    torch.empty(4, pin_memory=True).copy_(x, non_blocking=True)
    torch.where(x > 1, x, 0).sum()
    torch.full((), 3.0, device=GPU)
    dist.all_reduce(x, async_op=True).wait()
    x.to(torch.float64).to(GPU)
    x.to("cpu", non_blocking=True)
    torch.cuda.Event().query()


def test_work_that_stays_on_the_device_makes_nobody_wait() -> None:
    assert report_of(no_waits).syncs == []


def events() -> None:
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    second.record()
    with pytest.raises(RuntimeError, match="not ready"):
        first.elapsed_time(second)
    torch.ones(1, device=GPU).item()
    second.synchronize()
    assert first.elapsed_time(second) >= 0


def test_an_event_has_happened_once_the_host_has_waited() -> None:
    assert [one.what for one in report_of(events).syncs] == ["item"]


def kernels() -> None:
    x = torch.ones(1000, device=GPU)
    y = x + 1
    y.view(10, 100).t()[2:].expand(3, -1, -1)
    y.mul_(2)
    torch.empty_like(x)
    torch.ones(5) + 1


def one_more_kernel() -> None:
    kernels()
    torch.ones(10, device=GPU)


def test_kernels_and_their_bytes_are_counted_and_views_are_not() -> None:
    report = report_of(kernels)
    assert report.kernels == {"start": {"aten::ones": 1, "aten::add.Tensor": 1, "aten::mul_.Tensor": 1}}
    assert report.bytes == {"start": {"aten::ones": 4000, "aten::add.Tensor": 8000, "aten::mul_.Tensor": 8000}}
    assert report_of(one_more_kernel).num_kernels("start") == 4


def head_kernels() -> list[float]:
    from megatron_salt.model.kernels.passes import Blocks, new_logits, row_sums

    logits = new_logits(2, 5, torch.float32, torch.device("cuda", 0))
    logits.copy_(torch.arange(10.0, device=GPU).view(2, 5))
    label = torch.zeros(2, dtype=torch.int64, device=GPU)
    return row_sums(logits, None, label, 1.0, False, Blocks.of(logits)).cpu()[0].tolist()


def test_a_triton_kernel_runs_and_counts_as_one() -> None:
    [rank] = run_virtual(1, head_kernels)
    assert rank.result == [4.0, 9.0] and not rank.report.faults
    assert rank.report.kernels["start"]["megatron_salt::row_sums"] == 1
    assert set(rank.report.kernels["start"]) == {"megatron_salt::row_sums", "aten::arange", "aten::copy_", "aten::zeros"}


def memory() -> list[int]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device=GPU)
    y = x + x
    during = torch.cuda.memory_allocated() - before
    del x, y
    after = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    return [during, after, peak, torch.cuda.max_memory_allocated() - before]


def test_memory_is_counted_in_blocks_of_512_bytes() -> None:
    assert run_virtual(1, memory)[0].result == [2 * 4096, 0, 2 * 4096, 0]


def in_a_thread() -> None:
    thread = threading.Thread(target=mismatch)
    thread.start()
    thread.join()


def test_threads_are_watched_too() -> None:
    [fault] = report_of(in_a_thread).faults
    assert is_at(fault.where, mismatch, 2)


def numpy() -> None:
    torch.ones(3, device=GPU).numpy()


def test_numpy_refuses_the_device() -> None:
    with pytest.raises(RankError, match="can't convert cuda:0"):
        run_virtual(1, numpy)


def products() -> list[object]:
    left, right = torch.randn(3, 4, device=GPU).bfloat16(), torch.randn(4, 2, device=GPU).bfloat16()
    total = torch.ones(3, 2, device=GPU)
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    exact = torch.mm(left, right, out_dtype=torch.float32)
    return [exact.dtype, bool(torch.equal(total - 1, total - 1)), float((total - 1 - exact).abs().max()) < 1e-6]


def test_products_in_bfloat16_have_float32_results() -> None:
    [rank] = run_virtual(1, products)
    assert rank.result == [torch.float32, True, True]
    assert {"aten::mm.dtype", "aten::addmm.dtype"} <= set(rank.report.kernels["start"])


def branches() -> list[object]:
    import megatron_salt.parallel.cpu_seam  # noqa: F401

    from megatron_salt.model.kernels.passes import kernels_for
    from megatron_salt.parallel import device
    from megatron_salt.parallel.launch import find_hardware

    capability = find_hardware("cuda").capability  # and binds this rank's device
    return [device.SENDS_COPY, device.current_device(), kernels_for(torch.device("cuda", 0)) is not None, capability]


def test_the_package_takes_its_branches_for_a_gpu() -> None:
    for number, rank in enumerate(run_virtual(2, branches)):
        assert rank.result == [True, torch.device("cuda", number), True, (9, 0)]


def freed_at_once() -> list[float]:
    tensor = torch.full((1 << 16,), 7.0, device=GPU)
    if dist.get_rank() == 0:
        operations = [dist.P2POp(dist.isend, tensor, 1)]
        works = dist.batch_isend_irecv(operations)
        operations.clear()
        tensor.data = torch.empty((1,), device=GPU)  # as megatron-core does with what a stage has sent
        for _ in range(8):
            torch.full((1 << 16,), 9.0, device=GPU)
    else:
        works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, tensor.zero_(), 0)])
    for work in works:
        work.wait()
    return [float(tensor.min()), float(tensor.max())]


def test_a_sent_tensor_may_be_freed_at_once() -> None:
    assert run_virtual(2, freed_at_once)[1].result == [7.0, 7.0]
