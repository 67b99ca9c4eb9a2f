"""Llama 3's scaling of rotary frequencies out of a GGUF file. Pure.

Such a file has no numbers of the scaling. It has the tensor rope_freqs.weight: what each frequency is divided by. That is 1 for high
frequencies, the factor for low ones, and between them a mean whose weight is linear in the frequency. That line gives the numbers back.
Only the ratio of both limits to the original context counts, so the original context is taken to be Llama 3's.
"""

from __future__ import annotations

import numpy as np

ORIGINAL = 8192
"""The context that Llama 3 was trained with, in tokens."""
_TOLERANCE = 1e-4


def llama3_scaling(divisors: np.ndarray, base: float) -> dict[str, float] | None:
    """The rope_parameters of a llama3 scaling that divides the frequencies by `divisors`, float [head width / 2]; None: there is none."""
    divisors = divisors.astype(np.float64)
    factor = float(divisors.max())
    frequencies = _frequencies(len(divisors), base)
    middle = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    if divisors.min() < 1 - 1e-6 or factor <= 1 or middle.sum() < 2:
        return None
    weight = (1 / divisors[middle] - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(frequencies[middle], weight, 1)  # weight = (context / wavelength - low) / (high - low)
    if not slope > 0:
        return None
    distance = ORIGINAL / (2 * np.pi * slope)
    low = -start * distance
    for digits in (2, 12):
        numbers = {
            "factor": round(factor, 4),
            "low_freq_factor": round(float(low), digits),
            "high_freq_factor": round(float(low + distance), digits),
            "original_max_position_embeddings": float(ORIGINAL),
        }
        if np.allclose(divisors_of(numbers, len(divisors), base), divisors, rtol=_TOLERANCE):
            return numbers
    return None


def divisors_of(scaling: dict[str, float], count: int, base: float) -> np.ndarray:
    """What a llama3 scaling divides each of `count` frequencies by, float64 [count]."""
    turns = scaling["original_max_position_embeddings"] * _frequencies(count, base) / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    weight = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - weight) / scaling["factor"] + weight)


def _frequencies(count: int, base: float) -> np.ndarray:
    return base ** -(np.arange(count) / count)
