"""The gate and the schedules of the kd flags: how they are spelled, and what they say. Pure.

A gate is `none`, or KIND:BOUND. A schedule is a list of STEP:VALUE. Both stay text in the configuration; who uses them parses them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from megatron_salt.config.checks import flag
from megatron_salt.errors import UserError

GateKind = Literal["probability", "rank", "entropy"]
GATE_FORMS = "none, probability:P, rank:K or entropy:E"
LEAST_BOUND = 1e-30
"""Of a probability and of an entropy, which are float32. A smaller bound could be 0 there, and let tokens of probability 0 through."""


@dataclass(frozen=True)
class Gate:
    """Which tokens the teacher teaches, by its own figures at temperature 1. The others learn from their label alone."""

    kind: GateKind
    bound: float
    """probability: that of the label is at least this. rank: fewer ids than this are likelier than the label. entropy: that of the
    distribution is at most this, in nats."""


def parse_gate(text: str) -> Gate | None:
    """The gate that --kd-gate asks for; None for none. Raises UserError."""
    if text == "none":
        return None
    kind, _, number = text.partition(":")
    if kind not in get_args(GateKind):
        raise UserError(f"--kd-gate must be {GATE_FORMS}, got {text!r}")
    if kind == "rank":
        if not _WHOLE.fullmatch(number) or not 1 <= int(number) <= 2**31:
            raise UserError(f"--kd-gate {text}: the bound of a rank is a whole number from 1 on")
    elif kind == "probability":
        if not 0 < _number(number) < 1:
            raise UserError(f"--kd-gate {text}: the bound of a probability lies between 0 and 1, both excluded")
        if _number(number) < LEAST_BOUND:
            raise UserError(f"--kd-gate {text}: float32 cannot tell the bound from 0; take at least {LEAST_BOUND:g}")
    elif not LEAST_BOUND <= _number(number) < math.inf:
        raise UserError(f"--kd-gate {text}: the bound of an entropy is above 0 and finite, in nats; at least {LEAST_BOUND:g}")
    return Gate(cast(GateKind, kind), float(number))


def gate_kind(text: str) -> GateKind | None:
    """By what --kd-gate chooses tokens; None for none. Raises UserError."""
    gate = parse_gate(text)
    return None if gate is None else gate.kind


def refuse_idle_gate(gate: Gate | None, shared_ids: int) -> None:
    """Raise UserError where a gate would let every token through. shared_ids: ids of the teacher's distribution."""
    if gate is not None and gate.kind == "rank" and gate.bound >= shared_ids:
        raise UserError(
            f"--kd-gate rank:{gate.bound:g} lets every token through: student and teacher share {shared_ids} ids; take a lower "
            "bound, or --kd-gate none"
        )
    if gate is not None and gate.kind == "entropy" and gate.bound >= math.log(shared_ids):
        raise UserError(
            f"--kd-gate entropy:{gate.bound:g} lets every token through: a distribution over the {shared_ids} ids that student and "
            f"teacher share has at most {math.log(shared_ids):.4g} nats; take a lower bound, or --kd-gate none"
        )


REPLACED_BY = {"kd_weight": "kd_weight_schedule", "kd_teacher_temperature": "kd_temperature_schedule"}
"""{field with one value: field with the schedule that takes its place}"""

Points = tuple[tuple[int, float], ...]
"""(step, value), ascending steps."""


def parse_weights(words: Sequence[str]) -> Points:
    """The points of --kd-weight-schedule. Raises UserError."""
    return _parse_points("kd_weight_schedule", words, 0.0, 1.0)


def parse_temperatures(words: Sequence[str]) -> Points:
    """The points of --kd-temperature-schedule. Raises UserError."""
    return _parse_points("kd_temperature_schedule", words, 0.001, 1000.0)


def gate_text(text: str) -> str:
    """--kd-gate in the one spelling that a checkpoint keeps: rank:05 is rank:5. Raises UserError."""
    gate = parse_gate(text)
    return "none" if gate is None else f"{gate.kind}:{_decimal(gate.bound)}"


def schedule_text(points: Points) -> str:
    """A schedule in the one spelling that a checkpoint keeps, its entries with spaces between them: 1:.50 is 1:0.5."""
    return " ".join(f"{step}:{_decimal(value)}" for step, value in points)


def value_at(points: Points, step: int) -> float:
    """The value of a schedule at a step: on the line between the points around it; beyond the first and the last that point's own."""
    for (first, start), (last, end) in itertools.pairwise(points):
        if first <= step < last:
            return start + (end - start) * ((step - first) / (last - first))
    return points[0][1] if step < points[0][0] else points[-1][1]


def _parse_points(name: str, words: Sequence[str], low: float, high: float) -> Points:
    points = []
    for word in words:
        step, _, value = word.partition(":")
        if not _WHOLE.fullmatch(step) or not 1 <= int(step) <= 2**62:
            raise UserError(f"{flag(name)} {word}: each entry is STEP:VALUE, with steps from 1 on")
        if math.isnan(_number(value)):
            raise UserError(
                f"{flag(name)} {word}: each entry is STEP:VALUE, with spaces between entries, and {value!r} is no number"
            )
        if not low <= _number(value) <= high:
            raise UserError(f"{flag(name)} {word}: the value must lie in [{low:g}, {high:g}]")
        points.append((int(step), float(value)))
    for (before, _), (after, _) in itertools.pairwise(points):
        if after <= before:
            raise UserError(f"{flag(name)} {' '.join(words)}: steps must ascend, and {after} follows {before}")
    return tuple(points)


_WHOLE = re.compile(r"[0-9]{1,20}")
_DECIMAL = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def _decimal(value: float) -> str:
    """The shortest text that gives this number again, without a point where it is whole."""
    return str(value + 0.0).removesuffix(".0")  # + 0.0: no minus before a 0


def _number(text: str) -> float:
    """NaN where the text is no number. Spaces are none of it: a checkpoint keeps the entries of a schedule with spaces between them."""
    try:
        return float(text) if _DECIMAL.fullmatch(text) else math.nan
    except ValueError:
        return math.nan
