"""The spelling of gates, and bounds that would let every token through. tests/salt/test_schedule.py has the schedules."""

from __future__ import annotations

import math

import pytest

from megatron_salt.config.teaching import Gate, parse_gate, refuse_idle_gate
from megatron_salt.errors import UserError


def test_gates_by_hand() -> None:
    assert parse_gate("none") is None
    assert parse_gate("probability:0.05") == Gate("probability", 0.05)
    assert parse_gate("rank:10") == Gate("rank", 10)
    assert parse_gate("entropy:2e-1") == Gate("entropy", 0.2)


@pytest.mark.parametrize("text, told", [
    ("rank:50", "--kd-gate rank:50 lets every token through: student and teacher share 50 ids"),
    ("rank:51", "--kd-gate rank:51 lets every token through"),
    ("entropy:3.92", r"--kd-gate entropy:3.92 lets every token through: .* the 50 ids .* has at most 3.912 nats"),
])  # fmt: skip
def test_a_gate_that_lets_every_token_through_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        refuse_idle_gate(parse_gate(text), 50)


@pytest.mark.parametrize("text", ["none", "rank:49", "entropy:3.91", "probability:1e-9"])
def test_any_other_is_not(text: str) -> None:
    assert math.log(50) > 3.91
    refuse_idle_gate(parse_gate(text), 50)
