"""The last lines of a benchmark: `RESULT name=... value=... goal=... ok|short`, one for each figure. Types of its flags."""

from __future__ import annotations

import argparse
import math


def whole(text: str) -> int:
    """A flag's whole number, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def above_zero(text: str) -> float:
    """A flag's number above 0, finite."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return number


def result(name: str, value: float, goal: float, lower_is_better: bool = False) -> None:
    """Print one figure and whether it reaches its goal."""
    good = value <= goal if lower_is_better else value >= goal
    sign = "<=" if lower_is_better else ">="
    print(f"RESULT name={name} value={value:.4g} goal={sign}{goal:g} {'ok' if good else 'short'}", flush=True)
