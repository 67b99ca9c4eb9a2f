"""Whole runs under virtual CUDA: nothing mixes devices, the host waits where it is known to, and a step has as many kernels as recorded.

`kernels.json` has the kernels of a step, by release of megatron-core. Record them anew, with a reason in the commit, by
`RECORD_KERNELS=1 python -m pytest -n 0 --full tests/virtual_cuda/test_runs.py -k kernels`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import schedules

from megatron_salt.metrics.run_log import RunLog
from megatron_salt.parallel.mcore_compat import megatron_core_version
from megatron_salt.salt.teacher import Teacher
from megatron_salt.train.evaluate import evaluate
from megatron_salt.train.step import finish_step, train_step
from tests.support.virtual_cuda.recorder import Report, Sync
from tests.virtual_cuda.runs import CASES, FULL, Run, losses_on_the_cpu, virtual_run

RECORD = Path(__file__).with_name("kernels.json")
MOST_CHANGE = 0.05
"""By this part the kernels of a step may differ from the record."""


def name_of(function: Callable[..., Any]) -> str:
    """The function's name in `Sync.inside`."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"


CAUSES = {
    name_of(finalize_model_grads): "number of tokens",
    name_of(finish_step): "gradient norm",
    name_of(RunLog.step): "log line",
}
"""{function: why the host waits in it}."""
MICROBATCH = frozenset(map(name_of, (schedules.forward_step, schedules.backward_step, Teacher.annotate)))
"""Functions that work on one microbatch after the other."""

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


@cases
@pytest.mark.parametrize("work", [evaluate, train_step])
def test_the_host_never_waits_inside_a_microbatch(name: str, work: Callable[..., Any]) -> None:
    waits = [one for report in reports(virtual_run(name)) for one in report.syncs if name_of(work) in one.inside]
    assert waits, "it waits for figures behind the microbatches"
    assert [one for one in waits if one.inside & MICROBATCH] == []


def waits_of_a_step(name: str, logs: bool) -> dict[str, int]:
    """How often the host waits in a step of the case, by reason."""
    waits = {"gradient norm": 1}  # it decides whether the step is applied
    if megatron_core_version().startswith("0.16."):
        # Each chunk of the model divides its gradients by it, unless it is 0. 0.19 finds that out on the device.
        waits["number of tokens"] = CASES[name].flags.get("num_virtual_stages_per_pipeline_rank", 1)
    return waits | ({"log line": 1} if logs else {})  # the last stage reads the losses of all steps since the last line


@cases
def test_the_host_waits_for_the_gradient_norm_for_the_number_of_tokens_and_for_a_log_line(name: str) -> None:
    for kind, ranks in clean_steps(virtual_run(name)).items():
        for rank, (report, number) in enumerate(ranks):
            waits = [one for one in report.syncs if one.label in (f"step {number}", f"after step {number}")]
            logs = kind.endswith("logged") and rank == len(ranks) - 1
            assert Counter(map(cause, waits)) == waits_of_a_step(name, logs), (kind, rank, waits)


def cause(sync: Sync) -> str:
    """Why the host waits; a place that is not known stands for itself."""
    return next((why for function, why in CAUSES.items() if function in sync.inside), f"{sync.what} at {sync.where}")


@cases
def test_a_step_has_as_many_kernels_as_recorded(name: str) -> None:
    counted = {
        kind: [report.num_kernels(f"step {number}") for report, number in ranks]
        for kind, ranks in clean_steps(virtual_run(name)).items()
    }
    record = json.loads(RECORD.read_text())
    release = record["kernels"].setdefault(megatron_core_version(), {})
    if os.environ.get("RECORD_KERNELS") == "1":
        release[name] = counted
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    assert name in release, (
        f"{RECORD.name} has no {name!r} for megatron-core {megatron_core_version()}: {__doc__.splitlines()[3]}"
    )
    for kind, ranks in counted.items():
        assert ranks == pytest.approx(release[name][kind], rel=MOST_CHANGE), kind
