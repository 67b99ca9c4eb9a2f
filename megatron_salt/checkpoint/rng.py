"""A rank's random state: captured as one vector of bytes, put back bit for bit, or seeded anew.

It covers torch's CPU generator, the CUDA generator where there is one, and megatron-core's tracker of tensor-parallel
generators (dropout). Python's and numpy's generators take no part in training.
"""

from __future__ import annotations

import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import tensor_parallel

RngNames = list[tuple[str, int]]
"""Name and number of bytes of each part of the vector, in order."""


def capture() -> tuple[RngNames, torch.Tensor]:
    """This rank's random state: the names of its parts, and the parts as one uint8 vector on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().cpu()
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    states |= {f"tracker.{name}": state.cpu() for name, state in sorted(tracked.items())}
    return [(name, state.numel()) for name, state in states.items()], torch.cat(list(states.values()))


def restore(names: RngNames, vector: torch.Tensor) -> None:
    """Put back what `capture` returned on a rank with the same generators."""
    parts = torch.split(vector.cpu(), [size for _, size in names])
    tracked = {}
    for (name, _), part in zip(names, parts, strict=True):
        if name == "cpu":
            torch.set_rng_state(part.clone())
        elif name == "cuda":
            torch.cuda.set_rng_state(part.clone())
        else:
            tracked[name.removeprefix("tracker.")] = part.clone()
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
