"""Our FusedAdam is AdamW, and has the state layout of apex's: one integer step for each group, from which megatron-core can resume."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_salt.parallel import adamw
from megatron_salt.parallel.adamw import FusedAdam

STEPS = 6


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in [(7, 5), (5,), (3, 2), (1,)]]


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    """Two groups with different weight decay and learning rate, as megatron-core makes them."""
    return [
        dict(params=params[::2], weight_decay=0.1, lr=1e-2, betas=(0.9, 0.95), eps=1e-7),
        dict(params=params[1::2], weight_decay=0.0, lr=3e-2, betas=(0.8, 0.99), eps=1e-8),
    ]


def gradients(step: int, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Gradients of very different sizes, some of them 0."""
    generator = torch.Generator().manual_seed(step)
    scale = 10.0 ** (step - 3)
    return [(torch.randn(param.shape, generator=generator) * scale * (step != 4 or index != 1)).to(param.dtype) for index, param in
            enumerate(params)]  # fmt: skip


def adamw_in_float64(all_groups: list[dict]) -> list[torch.Tensor]:
    """AdamW as in Loshchilov and Hutter (2019), in float64."""
    flat = [(param, group) for pair in zip(*(group["params"] for group in all_groups), strict=True)
            for param, group in zip(pair, all_groups, strict=True)]  # fmt: skip
    values = [param.detach().double() for param, _ in flat]
    first, second = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    for step in range(1, STEPS + 1):
        for index, gradient in enumerate(gradients(step, [param for param, _ in flat])):
            group, gradient = flat[index][1], gradient.double()
            beta1, beta2 = group["betas"]
            first[index] = beta1 * first[index] + (1 - beta1) * gradient
            second[index] = beta2 * second[index] + (1 - beta2) * gradient**2
            direction = (first[index] / (1 - beta1**step)) / ((second[index] / (1 - beta2**step)).sqrt() + group["eps"])
            values[index] = values[index] - group["lr"] * (direction + group["weight_decay"] * values[index])
    return values


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range = range(1, STEPS + 1)) -> None:
    for step in steps:
        for param, gradient in zip(params, gradients(step, params), strict=True):
            param.grad = gradient
        optimizer.step()


def test_it_is_adamw():
    """Oracles: the formula in float64, and torch's AdamW."""
    ours, theirs = parameters(), parameters()
    exact = adamw_in_float64(groups(parameters()))
    train(FusedAdam(groups(ours)), ours)
    train(torch.optim.AdamW(groups(theirs)), theirs)
    for param, value, other in zip(ours, exact, theirs, strict=True):
        torch.testing.assert_close(param.detach().double(), value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


def test_its_state_is_apexs():
    params = parameters()
    optimizer = FusedAdam(groups(params))
    train(optimizer, params)
    state = optimizer.state_dict()
    assert [group["step"] for group in state["param_groups"]] == [STEPS, STEPS]
    assert all(type(group["step"]) is int for group in state["param_groups"])
    assert all(moments.keys() == {"exp_avg", "exp_avg_sq"} for moments in state["state"].values())
    assert [moments["exp_avg"].shape for moments in optimizer.state.values()] == [param.shape for group in optimizer.param_groups
                                                                                   for param in group["params"]]  # fmt: skip


def test_it_resumes_bit_for_bit():
    whole, halves = parameters(), parameters()
    train(FusedAdam(groups(whole)), whole)
    first = FusedAdam(groups(halves))
    train(first, halves, range(1, 4))
    second = FusedAdam(groups(halves))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, halves, range(4, STEPS + 1))
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))


def test_a_parameter_without_a_gradient_stays():
    param, idle = parameters()[:2]
    before = idle.detach().clone()
    optimizer = FusedAdam([param, idle], lr=0.1, weight_decay=0.1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(idle, before) and idle not in optimizer.state


IMPORTS = """
import importlib.machinery, importlib.util, os, sys
import torch  # once: each case is a fork
real = importlib.util.find_spec
for present in sys.argv[1:]:
    if (child := os.fork()) == 0:
        importlib.util.find_spec = lambda name, package=None: (
            importlib.machinery.ModuleSpec(name, None) if name == present
            else None if name in ("transformer_engine", "apex.optimizers") else real(name, package))
        import megatron_salt.parallel.adamw
        print(present, "apex.optimizers" in sys.modules, "apex" in sys.modules, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.long
def test_it_stands_in_only_where_neither_transformer_engine_nor_apex_is():
    command = [sys.executable, "-c", IMPORTS, "nothing", "transformer_engine", "apex.optimizers"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["nothing True False", "transformer_engine False False", "apex.optimizers False False"]


@pytest.mark.skipif("transformer_engine" in sys.modules, reason="Transformer Engine's own is used")
def test_megatron_core_takes_it():
    import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

    from megatron.core import optimizer

    assert optimizer.Adam is FusedAdam


def test_the_norm_and_the_scaling_are_megatron_cores_bit_for_bit() -> None:
    import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    assert clip_grads.l2_norm_impl is adamw._l2_norm and clip_grads.multi_tensor_scale_impl is adamw._scale
    for step in range(1, STEPS + 1):
        ours = gradients(step, parameters())
        theirs = [gradient.clone() for gradient in ours]
        flag = torch.zeros(1, dtype=torch.int)
        norm, _ = clip_grads.multi_tensor_applier(adamw._l2_norm, flag, [ours], False)
        expected, _ = utils.local_multi_tensor_applier(utils.local_multi_tensor_l2_norm, flag, [theirs], False)
        assert torch.equal(norm, expected) and norm.shape == (1,)
        clip_grads.multi_tensor_applier(adamw._scale, flag, [ours, ours], 0.37)
        utils.local_multi_tensor_applier(utils.local_multi_tensor_scale, flag, [theirs, theirs], 0.37)
        assert all(map(torch.equal, ours, theirs))


def test_a_copy_into_other_tensors_converts() -> None:
    wide = [torch.zeros(3), torch.zeros(2)]
    narrow = [torch.randn(3).bfloat16(), torch.randn(2).bfloat16()]
    adamw._scale(0, torch.zeros(1, dtype=torch.int), [narrow, wide], 1.0)
    assert all(torch.equal(one, other.float()) for one, other in zip(wide, narrow, strict=True))
