"""--teacher-cache under virtual CUDA: nothing mixes devices, and neither writing nor reading makes the host wait in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_salt.salt.teacher import Teacher
from tests.support import program
from tests.support.virtual_cuda.ranks import Recorded, run_virtual
from tests.virtual_cuda.runs import teacher

ANNOTATE = f"teacher.{Teacher.annotate.__qualname__}"


def start(world_size: int, **flags: Any) -> list[Recorded]:
    ranks = run_virtual(world_size, program.main, program.argv(**flags))
    assert [rank.result.status for rank in ranks] == [0] * world_size, [rank.result.err for rank in ranks]
    return ranks


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(1, dict(bf16=True), id="1 rank bf16", marks=pytest.mark.long),
        pytest.param(
            2, dict(tensor_model_parallel_size=2, teacher_tensor_model_parallel_size=2), id="tp2", marks=pytest.mark.full
        ),
    ],
)
def test_a_cache_mixes_no_devices_and_makes_the_host_wait_nowhere(
    tmp_path: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """A run that writes, one with another order that reads a part, and one that reads all."""
    flags = flags | dict(
        data_path=program.write_tokens(tmp_path / "words", windows=60), teacher_load=teacher(), kd_steps=3, train_iters=3,
        log_interval=3, transformer_impl="torch", loss_chunk_tokens=None, valid_share=0.5, micro_batch_size=1, global_batch_size=4,
        teacher_cache=tmp_path / "cache",
    )  # fmt: skip
    losses = {}
    for name, seed in (("cold", 1234), ("part", 4321), ("warm", 1234)):
        ranks = start(world_size, **flags, seed=seed, save=tmp_path / name)
        for rank in ranks:
            assert rank.report.faults == [], rank.report.text()
            waits = [one for one in rank.report.syncs if one.label.startswith("step") and ANNOTATE in one.inside]
            assert waits == [], waits
        losses[name] = program.losses(tmp_path / name)
        share = [entry["teacher_cached"] for entry in program.entries(tmp_path / name)]
        assert {"cold": share == [0.0] * 3, "part": 0 < sum(share) < 3, "warm": share == [1.0] * 3}[name], share
    assert losses["warm"] == losses["cold"]
