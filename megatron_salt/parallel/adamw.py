"""AdamW with the state layout of apex's and Transformer Engine's FusedAdam: one `step` a parameter group.

torch's AdamW keeps a step tensor for each parameter, and megatron-core's distributed optimizer cannot resume from that. Without
Transformer Engine and apex, on CPU or GPU, megatron-core therefore gets this optimizer instead of apex's. Each loads the other's
checkpoints. Importing this module installs it; `parallel/cpu_seam.py`, which users of megatron-core import first, does so.

With it come apex's norm and scaling of a list of tensors. megatron-core's own norm reads the norm of every parameter from the device, so
the host would wait once a parameter in each step.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable

import torch

from megatron_salt.parallel.machine import importable


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay, on torch's fused kernel. The constructor takes what megatron-core passes to apex's.

    State: for each parameter `exp_avg` and `exp_avg_sq`, of its shape and dtype; for each group an int `step`, counted from 1.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay"
        assert not capturable, "not inside a CUDA graph"
        super().__init__(params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            states = [self._state_of(param) for param in params]
            step = torch.full((), float(group["step"]), device=params[0].device)  # torch.tensor would wait for the device
            torch._fused_adamw_(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        return state


def _apply(kernel: Callable, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *arguments: object) -> object:
    """apex's `multi_tensor_applier`."""
    return kernel(0, noop_flag, tensor_lists, *arguments)


def _l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """The Euclidean norm of all tensors of the first list together: float32 [1], on their device."""
    assert not per_tensor, "one norm of all tensors"
    norms = torch._foreach_norm(tensor_lists[0])
    return torch.norm(torch.stack([norm.float() for norm in norms])).view(1), None


def _scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float) -> None:
    """Every tensor of the second list = the one of the first * scale. Lists are the same, or scale is 1."""
    sources, targets = tensor_lists
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        assert scale == 1, "a scaled copy"
        torch._foreach_copy_(targets, sources)
    elif targets:
        torch._foreach_mul_(targets, scale)


def _stand_in_for_apex() -> None:
    """Let the imports of apex's optimizer and of its norm and scaling give ours. `import apex` still fails, so megatron-core uses nothing
    else of apex."""
    assert "megatron.core.optimizer" not in sys.modules, (
        "megatron_salt.parallel.adamw must be imported before megatron.core.optimizer"
    )
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam, module.FusedSGD = FusedAdam, torch.optim.SGD  # type: ignore[attr-defined]
    sys.modules["apex.optimizers"] = module
    kernels, applier = types.ModuleType("amp_C"), types.ModuleType("apex.multi_tensor_apply")
    kernels.multi_tensor_l2norm, kernels.multi_tensor_scale = _l2_norm, _scale  # type: ignore[attr-defined]
    applier.multi_tensor_applier = _apply  # type: ignore[attr-defined]
    sys.modules.update({"amp_C": kernels, "apex.multi_tensor_apply": applier})


if not (importable("transformer_engine") or importable("apex.optimizers")):
    _stand_in_for_apex()
