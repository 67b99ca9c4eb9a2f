"""What only a GPU can show, on one: NCCL, CUDA kernels and generators under the very code that the CPU tests run.

Skipped where there is none. The bodies are stages of tests/gpu/first_run.py, whose expected numbers a CPU recorded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.stages import head, small_model
from tests.gpu.stages.first import STAGES
from tests.gpu.stages.runner import Report, Setting, Stage

pytestmark = pytest.mark.gpu

BODIES = (
    head.exact, small_model.training, small_model.teaching_stage, small_model.programs, small_model.resuming, small_model.freeing,
)  # fmt: skip


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.run in BODIES], ids=lambda stage: stage.name)
def test_one_gpu_finds_what_a_cpu_found(tmp_path: Path, stage: Stage) -> None:
    report = Report()
    stage.run(Setting(device="cuda", tiny=False, scratch=tmp_path, timed=True), report)
    assert not report.problems
