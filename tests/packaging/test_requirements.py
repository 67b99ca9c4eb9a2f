"""Packages that megatron-core needs without declaring them are in the requirements, and installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path


def test_psutil_is_required():
    """megatron-core's checkpoint writer imports it: without it 0.16.1 hangs and 0.19 fails."""
    lines = (Path(__file__).parents[2] / "requirements.txt").read_text().splitlines()
    assert "psutil" in {re.split(r"[^\w-]", line)[0] for line in lines}
    assert importlib.util.find_spec("psutil")


def test_the_apex_of_pypi_is_not_required():
    """The apex on PyPI is an unrelated package."""
    for path in Path(__file__).parents[2].glob("*requirements*.txt"):
        assert not [line for line in path.read_text().splitlines() if re.match(r"apex\b", line)], path
