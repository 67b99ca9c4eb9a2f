"""Checks that the sections of the configuration share, and the spelling of a flag.

Each check raises UserError, which names the flag.
"""

from __future__ import annotations

from dataclasses import fields
from math import inf
from typing import Any

from megatron_salt.errors import UserError


def flag(name: str) -> str:
    """The command-line flag of a field: --num-layers for num_layers. A field whose name Python keeps for itself has a _ at its end."""
    return "--" + name.rstrip("_").replace("_", "-")


def at_least(section: object, minimum: float, *names: str) -> None:
    """Refuse values below `minimum`, infinity and NaN; None is allowed."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= minimum:  # not (value >= minimum) also rejects NaN
            raise UserError(f"{flag(name)} must be at least {minimum}, got {value}")
        if value == inf:
            raise UserError(f"{flag(name)} must be finite, got {value}")


def above_zero(section: object, *names: str) -> None:
    """Refuse values that are not positive, infinity and NaN; None is allowed."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < inf:
            raise UserError(f"{flag(name)} must be above 0 and finite, got {value}")


def within(section: object, low: float, high: float, *names: str) -> None:
    """Refuse values outside [low, high] and NaN; None is allowed."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{flag(name)} must lie in [{low}, {high}], got {value}")


def from_zero_to_below_one(section: object, *names: str) -> None:
    """Refuse values outside [0, 1) and NaN."""
    for name in names:
        value = getattr(section, name)
        if not 0.0 <= value < 1.0:
            raise UserError(f"{flag(name)} must be at least 0 and below 1, got {value}")


_FLOAT32 = (1.1754943508222875e-38, 3.4028234663852886e38)  # smallest normal number and largest one
_LARGEST_COUNT = 2**62


def representable(section: Any) -> None:
    """Refuse numbers that a run cannot represent: floats outside float32, counts that do not fit into int64."""
    for leaf in fields(section):
        value = getattr(section, leaf.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and number != 0 and not _FLOAT32[0] <= abs(number) <= _FLOAT32[1]:
                raise UserError(
                    f"{flag(leaf.name)} must be 0 or between {_FLOAT32[0]:.3g} and {_FLOAT32[1]:.3g} in size, as float32 "
                    f"holds it, got {number}"
                )
            if isinstance(number, int) and abs(number) > _LARGEST_COUNT:
                raise UserError(f"{flag(leaf.name)} must be at most {_LARGEST_COUNT} in size, got {number}")
