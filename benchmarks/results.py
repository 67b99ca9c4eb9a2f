"""The last lines of a benchmark: `RESULT name=... value=... goal=... ok|short`, one for each figure."""

from __future__ import annotations


def result(name: str, value: float, goal: float, lower_is_better: bool = False) -> None:
    """Print one figure and whether it reaches its goal."""
    good = value <= goal if lower_is_better else value >= goal
    sign = "<=" if lower_is_better else ">="
    print(f"RESULT name={name} value={value:.4g} goal={sign}{goal:g} {'ok' if good else 'short'}", flush=True)
