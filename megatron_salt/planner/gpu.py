"""The GPU that a plan is for. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.cards import CARDS, SHORT_NAMES
from megatron_salt.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    name: str
    memory_gib: float
    capability: tuple[int, int]
    """Compute capability"""


def gpu_of(asked: str | None, memory_gib: float | None = None) -> Gpu:
    """The GPU of --gpu and --gpu-memory-gib. Raises UserError."""
    if memory_gib is not None and not 0 < memory_gib < 1e6:
        raise UserError(f"--gpu-memory-gib must be above 0, got {memory_gib}")
    if asked is None:
        if memory_gib is None:
            raise UserError(f"give --gpu, one of {', '.join(SHORT_NAMES)}, or --gpu-memory-gib")
        return Gpu("a GPU without a name", memory_gib, CARDS[SHORT_NAMES["h100-80"]].capability)
    name = SHORT_NAMES.get(asked.lower(), asked)
    if name not in CARDS:
        known = [*SHORT_NAMES, *CARDS]
        raise UserError(
            f"--gpu {asked} is not known{did_you_mean(asked, known)}; known are {', '.join(SHORT_NAMES)}, and names of drivers such as "
            "NVIDIA L40; or give tools/plan.py --gpu-memory-gib"
        )
    return Gpu(name, memory_gib or CARDS[name].memory_gib, CARDS[name].capability)
