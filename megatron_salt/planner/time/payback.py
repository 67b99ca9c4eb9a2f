"""When a teacher has paid: how many runs must share it, and what a teacher's training may cost. Pure.

All costs are in one unit: FLOPs, seconds or hours of GPUs."""

from __future__ import annotations

import math


def runs_to_share(saved: float, shared: float) -> int | None:
    """The least number of runs, each of which saves `saved`, that pay for what they share; None where no number does."""
    return max(1, math.ceil(shared / saved)) if saved > 0 else None
