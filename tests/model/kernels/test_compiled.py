"""The output head's kernels, compiled for three generations of GPUs without one: `compiled.py` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPILED = Path(__file__).with_name("compiled.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(COMPILED.parents[3]),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([sys.executable, str(COMPILED)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
def test_every_form_compiles_without_spills_in_at_most_128_registers(compiled: list[dict[str, Any]]) -> None:
    assert {form["architecture"] for form in compiled} == {80, 90, 100} and len(compiled) == 48
    assert [form for form in compiled if form["spilled"] != [0] or not form["registers"] or max(form["registers"]) > 128] == []


@pytest.mark.long
def test_logits_are_read_and_written_16_bytes_at_a_time_whatever_the_vocabulary(compiled: list[dict[str, Any]]) -> None:
    assert [form for form in compiled if not form["wide_loads"]] == []  # the number of real ids is not a multiple of anything
    gradients = [form for form in compiled if form["kernel"] == "into_gradient_kernel"]
    assert len(gradients) == 12 and all(form["wide_stores"] for form in gradients)


@pytest.mark.long
def test_products_and_sums_are_not_contracted(compiled: list[dict[str, Any]]) -> None:
    assert [form for form in compiled if form["multiplies_and_adds"]] == []


@pytest.mark.long
def test_rows_are_found_by_64_bit_offsets(compiled: list[dict[str, Any]]) -> None:
    """8,389 rows of 256,000 logits have more than 2^31 of them."""
    assert all(form["row_offsets"] and set(form["row_offsets"]) == {"i64"} for form in compiled)
