"""The first run on a GPU, without one: every stage runs in small on the CPU, and one that fails takes nothing else along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from tests.gpu.stages import pair, seeded, small_model
from tests.gpu.stages.first import STAGES
from tests.gpu.stages.runner import (
    RESULTS,
    STACKS,
    TABLE,
    NotHereError,
    Report,
    Runner,
    Setting,
    Stage,
    read_outcomes,
    write_table,
)

PROGRAM = Path(__file__).parent / "first_run.py"


def carry_out(tmp_path: Path, stages: list[Stage], seconds: float = 60.0, **more: object) -> dict[str, str]:
    """Run stages; {name: status}."""
    setting = Setting(device="cpu", tiny=True, scratch=tmp_path, timed=True)
    Runner(setting, tmp_path, time.time() + seconds, **more).run(stages)  # type: ignore[arg-type]
    return {one.stage: one.status for one in read_outcomes(tmp_path)}


def good(setting: Setting, report: Report) -> None:
    report.note(answer=42, rows=[{"a": 1, "b": 0.5}, {"a": 2}])


def raises(setting: Setting, report: Report) -> None:
    report.note(before=1.5)
    raise RuntimeError("planted\nsecond line")


def wrong(setting: Setting, report: Report) -> None:
    report.compare("loss", [1.0, 2.1], [1.0, 2.0], 1e-2)


def leaves(setting: Setting, report: Report) -> None:
    sys.exit(3)


def missing(setting: Setting, report: Report) -> None:
    raise NotHereError("no such library")


def sleeps(setting: Setting, report: Report) -> None:
    time.sleep(30)


def hangs(setting: Setting, report: Report) -> None:
    """As in a call of CUDA that does not return: the alarm is not heard."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(30)


def test_a_stage_that_fails_takes_nothing_else_along(tmp_path: Path) -> None:
    functions = [raises, wrong, leaves, missing, good]
    told = carry_out(tmp_path, [Stage(function.__name__, 5, function) for function in functions])
    assert told == {"raises": "failed", "wrong": "failed", "leaves": "failed", "missing": "not here", "good": "ok"}
    first, second, *_ = read_outcomes(tmp_path)
    assert first.figures == {"before": 1.5} and first.problems == ["RuntimeError: planted"] and "second line" in first.trace
    assert second.problems == ["loss: 2.1 where 2.0 is expected (tolerance 0.01); 1 of 2 numbers are off"]
    assert not write_table(tmp_path)
    table = (tmp_path / TABLE).read_text()
    assert "| raises | failed |" in table and "| answer | 42 |" in table and "| 1 | 0.5 |\n| 2 |  |" in table


def test_a_figure_that_is_not_a_number_is_a_problem_and_a_word(tmp_path: Path) -> None:
    def not_a_number(setting: Setting, report: Report) -> None:
        report.note(loss=float("nan"))
        report.compare("loss", [float("nan")], [1.0], 1e-2)

    assert carry_out(tmp_path, [Stage("nan", 5, not_a_number)]) == {"nan": "failed"}
    assert json.loads((tmp_path / RESULTS).read_text().splitlines()[-1])["figures"]["loss"] == "nan"


def test_a_stage_is_stopped_at_its_limit_and_left_out_where_it_does_not_fit(tmp_path: Path) -> None:
    stages = [Stage("sleeps", 0.2, sleeps), Stage("long", 100, good), Stage("good", 5, good)]
    assert carry_out(tmp_path, stages) == {"sleeps": "failed", "long": "no time", "good": "ok"}
    assert read_outcomes(tmp_path)[0].problems == ["OutOfTimeError: stopped after 0.2 s"]


IN_A_CHILD = """
import sys, time
from pathlib import Path
from tests.gpu import test_first_run as here
out = Path(sys.argv[1])
def restart(stage): here.os.execv(sys.executable, [sys.executable, "-c", "print('anew after', %r)" % stage])
here.carry_out(out, [here.Stage("hangs", 0.2, getattr(here, sys.argv[2])), here.Stage("good", 5, here.good)], grace=0.3,
               restart=restart if len(sys.argv) > 3 else None)
"""


def in_a_child(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IN_A_CHILD, str(tmp_path), *words]
    return subprocess.run(
        command, cwd=PROGRAM.parents[2], capture_output=True, text=True, timeout=120, check=False, env=os.environ
    )


@pytest.mark.parametrize("restarts", [False, True])
def test_a_stage_that_hangs_is_named_and_the_process_ends_or_starts_anew(tmp_path: Path, restarts: bool) -> None:
    ended = in_a_child(tmp_path, "hangs", *(["restart"] if restarts else []))
    assert ended.returncode == (0 if restarts else 1), ended
    [outcome] = read_outcomes(tmp_path)
    assert outcome.status == "hung" and "in hangs" in (tmp_path / STACKS).read_text()
    assert ("anew after hangs" in ended.stdout) == restarts and (tmp_path / TABLE).exists() != restarts


def test_where_the_process_cannot_be_cleaned_it_starts_anew(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    setting, asked = Setting(device="cpu", tiny=True, scratch=tmp_path, timed=False), []
    Runner(setting, tmp_path, time.time() + 60, asked.append).run([Stage("good", 5, good)], broken)
    assert asked == ["good"] and [one.status for one in read_outcomes(tmp_path)] == ["ok", "failed"]


def test_a_killed_process_leaves_the_lines_before_and_names_the_stage(tmp_path: Path) -> None:
    def dies(setting: Setting, report: Report) -> None:
        os._exit(9)

    if (child := os.fork()) == 0:
        carry_out(tmp_path, [Stage("good", 5, good), Stage("dies", 5, dies)])
    os.waitpid(child, 0)
    assert {one.stage: one.status for one in read_outcomes(tmp_path)} == {"good": "ok", "dies": "started"}
    assert not write_table(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("what, factor", [("loss", 1.01), ("grad_norm", 1.1), ("weights", 0), ("scores", 1.01)])
def test_other_numbers_than_the_recorded_ones_are_a_problem(dtype: str, what: str, factor: float) -> None:
    name = "training" if what == "weights" else "programs"
    recorded, found = seeded.expected(name)[dtype], seeded.expected(name)[dtype]
    report = Report()
    small_model.compare(report, dtype, found, recorded)
    assert not report.problems
    if what == "weights":
        found["weights"] = "0123456789abcdef"
    elif what == "scores":
        found["scores"]["mean"] = [factor * one for one in found["scores"]["mean"]]
    else:
        found[what][-1] *= factor
    small_model.compare(report, dtype, found, recorded)
    assert (len(report.problems) == 1 and dtype in report.problems[0]) or "seeded weights" in report.problems[0]


def row(key: str, device: DeviceType, milliseconds: float, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        key=key, device_type=device, is_user_annotation=annotation, count=2, self_device_time_total=1e3 * milliseconds,
        self_cpu_time_total=1.0,
    )  # fmt: skip


def test_time_on_the_device_is_counted_once() -> None:
    """torch gives a kernel's time to the kernel, to the operation that launched it, and to annotations around it."""
    rows = [row("aten::mm", DeviceType.CPU, 3), row("gemm", DeviceType.CUDA, 3), row("row_sums", DeviceType.CUDA, 1),
            row("step", DeviceType.CUDA, 4, annotation=True)]  # fmt: skip
    told = [(one["kernel"], one["ms"], one["share"]) for one in pair.top_kernels(rows, timed=True)]
    assert told == [("gemm", 3, 0.75), ("row_sums", 1, 0.25)]


def test_a_wait_is_named_by_its_module() -> None:
    site = "/opt/venv/lib/python3.12/site-packages"
    assert pair.place_of(f"{site}/megatron/core/optimizer/clip_grads.py") == "megatron/core/optimizer/clip_grads.py"
    assert pair.place_of("/work/run/megatron_salt/train/step.py") == "megatron_salt/train/step.py"


# ---- the program -----------------------------------------------------------------------------------------------------------------


def first_run(*words: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *words], capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )


@pytest.mark.long
def test_every_stage_runs_in_small_on_the_cpu_and_finds_the_recorded_numbers(tmp_path: Path) -> None:
    ended = first_run(str(tmp_path / "out"), "--tiny", "--device", "cpu")
    outcomes = read_outcomes(tmp_path / "out")
    assert ended.returncode == 0, (ended, outcomes)
    assert [one.stage for one in outcomes] == [stage.name for stage in STAGES]
    assert {one.stage for one in outcomes if one.status != "ok"} == {"a freed teacher's memory"}
    figures = {one.stage: one.figures for one in outcomes}
    speed, other = figures["0.8B with a teacher of 0.4B"]["speed"], figures["0.8B with a teacher of 0.4B"]
    assert [row["stage"] for row in speed] == [1, 2] and all(0 < row["head's share"] < 1 for row in speed)
    assert other["kernels"] and len(other["predicted"]) == 1 and other["predicted"][0] > 1
    assert [(row["head"], row.get("not here")) for row in figures["time of the head"]["times"][4:]] == [
        ("chunks", None), ("plain", None), ("liger", "liger_kernel not installed"),
    ]  # fmt: skip
    assert figures["kill -9 in a write"]["kills"][0]["same bits as uninterrupted"]
    assert (tmp_path / "out" / TABLE).read_text().count("\n## ") == len(STAGES) - 1
    again = first_run(str(tmp_path / "out"), "--tiny", "--device", "cpu")
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "name a new folder" in again.stderr


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    ended = first_run(str(tmp_path / "out"))
    assert ended.returncode == 2 and not (tmp_path / "out").exists()
    assert "sees no NVIDIA GPU" in ended.stderr.splitlines()[-1] and "--tiny --device cpu" in ended.stderr


def test_the_time_that_the_first_stages_may_take_leaves_room_for_the_pair_of_models() -> None:
    """All limits together are more than 8 minutes: limits are not estimates. But nothing before the large pair may push it out."""
    before = [stage.seconds for stage in STAGES[: [stage.name for stage in STAGES].index("0.8B with a teacher of 0.4B") + 1]]
    assert sum(before) <= 480


@pytest.mark.full
def test_the_gpus_branches_run_without_a_fault_under_virtual_cuda(tmp_path: Path) -> None:
    """The kernels in Triton's interpreter give the recorded numbers, and a freed teacher gives its memory back."""
    stages = [
        "training as on a CPU",
        "a teacher as on a CPU",
        "resuming",
        "a freed teacher's memory",
        "0.8B with a teacher of 0.4B",
    ]
    ended = first_run(str(tmp_path / "out"), "--tiny", "--device", "virtual", "--stages", *stages, timeout=1200)
    outcomes = read_outcomes(tmp_path / "out")
    assert ended.returncode == 0, (ended, outcomes)
    assert {one.stage: one.status for one in outcomes} == dict.fromkeys(stages, "ok")
