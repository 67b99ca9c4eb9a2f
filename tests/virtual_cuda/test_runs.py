"""Whole runs under virtual CUDA: nothing mixes devices, the host waits where it is known to, and a step has as many kernels as recorded.

`kernels.json` has the kernels of a step, by release of megatron-core. Record them anew, with a reason in the commit, by
`RECORD_KERNELS=1 python -m pytest -n 0 --full tests/virtual_cuda/test_runs.py -k kernels`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.virtual_cuda.recorder import Report
from tests.virtual_cuda.runs import CASES, FULL, Run, losses_on_the_cpu, virtual_run

RECORD = Path(__file__).with_name("kernels.json")
MOST_CHANGE = 0.05
"""By this part the kernels of a step may differ from the record."""

TOKEN_COUNT = Counter(["finalize_model_grads.finalize_model_grads"])
"""In every step megatron-core reads whether there is any token, before it divides gradients by their number."""
GRADIENT_NORM = Counter(["step.finish_step"])
"""In every step the norm decides whether the step is applied."""

cases = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in CASES])


def clean_steps(run: Run) -> dict[str, list[tuple[Report, str]]]:
    """{kind: (report, number in its start) of each rank} of steps that neither save nor evaluate, and follow no such step."""
    return {
        "stage 1": [(rank.report, "1") for rank in run.first],
        "stage 1, logged": [(rank.report, "1") for rank in run.second],
        "stage 2, logged": [(rank.report, "3") for rank in run.second],
        "stage 2": [(rank.report, "4") for rank in run.second],
    }


def reports(run: Run) -> list[Report]:
    return [rank.report for start in (run.first, run.second) for rank in start]


@cases
def test_nothing_mixes_devices_from_the_start_to_the_last_save(name: str) -> None:
    for report in reports(virtual_run(name)):
        assert report.faults == [], report.text()


@cases
def test_losses_are_those_of_a_cpu_run(name: str) -> None:
    tolerance = 1e-2 if "bf16" in CASES[name].flags else 1e-5
    assert virtual_run(name).losses == pytest.approx(losses_on_the_cpu(name), rel=tolerance)


MICROBATCH = frozenset({"schedules.forward_step", "schedules.backward_step", "teacher.Teacher.annotate"})


@cases
def test_the_host_never_waits_inside_a_microbatch(name: str) -> None:
    for report in reports(virtual_run(name)):
        inside = [one for one in report.syncs if one.inside & MICROBATCH and "step.train_step" in one.inside]
        assert inside == []
