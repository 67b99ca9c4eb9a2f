"""The CPU seam changes nothing with a GPU; without one it makes CUDA's names mean the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.parallel.device import current_device

ROOT = Path(__file__).parents[2]

# What the seam may touch, as identities of everything in it, before and after the seam is imported. `torch.cuda.is_available` is
# made to answer `has_gpu` first; megatron-core is imported by the seam itself only where it applies.
WATCH = """
import json, sys, torch
import torch.utils.checkpoint, torch.amp.autocast_mode
torch.cuda.is_available = lambda: {has_gpu}
places = dict(torch=torch, cuda=torch.cuda, random=torch.cuda.random, nvtx=torch.cuda.nvtx, amp=torch.amp,
              tensor=torch.Tensor, module=torch.nn.Module)
look = lambda: {{(place, name): id(value) for place, holder in places.items() for name, value in vars(holder).items()}}
keep = [list(vars(holder).values()) for holder in places.values()]  # so that no identity is used twice
before, modules = look(), set(sys.modules)
import megatron_salt.parallel.cpu_seam
after = look()
changed = sorted('.'.join(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key))
suspects = ('megatron', 'apex', 'fused_weight_gradient_mlp_cuda')
foreign = sorted(name for name in set(sys.modules) - modules if name.split('.')[0] in suspects)
compiler = sorted({{name for name in sys.modules if name in ('torch._dynamo', 'torch._inductor', 'torch._inductor.lowering')}})
print(json.dumps([changed, foreign, compiler]))
"""


def watch(has_gpu: bool) -> list[list[str]]:
    """Names in torch that importing the seam changed, foreign modules that it added, and modules of torch's compiler."""
    command = [sys.executable, "-W", "ignore", "-c", WATCH.format(has_gpu=has_gpu)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_where_there_is_a_gpu_nothing_of_torch_is_changed():
    changed, foreign, _ = watch(has_gpu=True)
    assert changed == []
    stand_ins = {"apex.optimizers", "apex.multi_tensor_apply", "amp_C"}  # AdamW and its norm: not part of the seam
    assert set(foreign) - stand_ins == set()


@pytest.mark.long
def test_where_there_is_none_the_watch_sees_the_changes():
    changed, foreign, compiler = watch(has_gpu=False)
    assert {"torch.empty", "cuda.current_device", "tensor.cuda", "module.cuda", "amp.autocast", "random.get_rng_state"} <= set(
        changed
    )
    assert "fused_weight_gradient_mlp_cuda" in foreign
    # megatron-core's functions for torch.compile stay as they are written: its import is a third of a process's start
    assert compiler == [] and "torch.compile" not in changed


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the seam is a no-op on a GPU")


@cpu_only
def test_tensors_asked_for_on_cuda_are_on_the_cpu():
    for tensor in (
        torch.empty(2, device="cuda"),
        torch.zeros(2, device="cuda:0"),
        torch.ones(2, device=torch.device("cuda")),
        torch.tensor([1.0], device=torch.cuda.current_device()),
        torch.ones(2).cuda(),
        torch.empty_like(torch.ones(2), device="cuda", pin_memory=True),
    ):
        assert tensor.device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    assert current_device().type == "cpu"


@cpu_only
def test_type_is_cudas_name_and_still_converts():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


@cpu_only
def test_cudas_random_state_is_the_cpus():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@cpu_only
def test_dropout_inside_the_tracker_leaves_the_state_outside_untouched():
    from megatron.core.tensor_parallel import random as tracked

    tracked.initialize_rng_tracker(force_reset=True)
    tracker = tracked.get_cuda_rng_tracker()
    tracker.add("model-parallel-rng", 7)
    outside = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(3)
    with tracker.fork():
        second = torch.rand(3)
    tracked.initialize_rng_tracker(force_reset=True)
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(torch.cat([first, second]), torch.rand(6, generator=torch.Generator().manual_seed(7)))


@cpu_only
def test_autocast_for_cuda_is_autocast_for_the_cpu():
    left, right = torch.ones(2, 2), torch.ones(2, 2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (left @ right).dtype == torch.bfloat16
    with torch.autocast("cuda", enabled=False):
        assert (left @ right).dtype == torch.float32


@cpu_only
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_weight_gradient_kernel_adds_to_main_grad(dtype, tolerance):
    import fused_weight_gradient_mlp_cuda as kernel

    inputs, grad_output = torch.randn(6, 3).to(dtype), torch.randn(6, 4).to(dtype)
    start = torch.randn(4, 3)
    main_grad = start.clone()
    kernel.wgrad_gemm_accum_fp32(inputs, grad_output, main_grad)
    torch.testing.assert_close(main_grad, start + grad_output.float().t() @ inputs.float(), rtol=tolerance, atol=tolerance)
