"""What the first run of Transformer Engine does, without it: the same runs with torch's layers, and the words where it is missing."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.precision_steps import TINY, ways
from megatron_salt.model.precision import TORCH
from tests.gpu import trim_fatbin
from tests.gpu.stages import engine
from tests.gpu.stages.runner import NotHereError, Report, Setting, read_outcomes
from tests.support.ranks import run_ranks

PROGRAM = Path(__file__).parent / "first_run_te.py"
PLAIN = dict(transformer_impl="torch")


def alone() -> None:
    """Leave the group of the pool and forget its variables: each run makes a world of its own."""
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]


def told(name: str, scratch: Path) -> Report:
    """What one body reports, in a process of the pool."""
    alone()
    report = Report()
    if name == "first steps":
        engine.first_steps(report, scratch, TORCH)
    elif name == "follows":
        engine.follows(report, scratch, TORCH, TORCH, 10)
    elif name == "resumes":
        engine.resumes(report, scratch, PLAIN, 4)
    else:
        report.note(**engine.teaches(scratch, PLAIN, {}, 4))
    return report


@pytest.mark.parametrize("name", ["first steps", "follows", "resumes"])
def test_the_bodies_find_no_difference_between_a_run_and_itself(tmp_path: Path, name: str) -> None:
    [report] = run_ranks(1, told, name, tmp_path)
    assert not report.problems
    assert all(row["largest relative difference"] == 0 for row in report.figures["comparisons"])


def test_a_run_with_a_teacher_tells_what_the_switch_gave_back(tmp_path: Path) -> None:
    [report] = run_ranks(1, told, "teaches", tmp_path)
    assert len(report.figures["teacher_ce"]) == 2 and report.figures["gate"] == {}


def test_a_precision_that_this_machine_lacks_has_a_row_with_the_reason(tmp_path: Path) -> None:
    wanted = {name: words for name, words in ways().items() if name in ("torch, bf16", "FP8 tensorwise")}
    [rows] = run_ranks(1, rows_here, tmp_path, wanted)
    assert rows[0]["stage 1, s"] > 0 and "Transformer Engine is not installed" in rows[1]["not here"]


def rows_here(scratch: Path, wanted: dict[str, list[str]]) -> list[dict]:
    alone()
    return engine.rows_of(Setting(device="cpu", tiny=True, scratch=scratch, timed=False), TINY, wanted, 8)


def test_without_transformer_engine_every_stage_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path / "out"), "--tiny", "--device", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended
    first, *others = read_outcomes(tmp_path / "out")
    assert first.status == "ok" and len(others) == len(engine.STAGES) - 1
    assert {(one.status, one.problems[0]) for one in others} == {("not here", "Transformer Engine is not installed")}


def test_a_need_names_its_reason() -> None:
    with pytest.raises(NotHereError, match="Transformer Engine is not installed"):
        engine.need(engine.ENGINE)


# ---- a library for one GPU -------------------------------------------------------------------------------------------------------


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """A fat binary of entries (kind, architecture, code), with the 64-byte headers that nvcc writes."""
    body = b""
    for kind, architecture, code in entries:
        body += (
            struct.pack("<HHIQ", kind, 0x101, 64, len(code)).ljust(28, b"\1")
            + struct.pack("<I", architecture).ljust(36, b"\2")
            + code
        )
    return trim_fatbin.HEADER.pack(trim_fatbin.MAGIC, 1, 16, len(body)) + body


def test_only_machine_code_of_the_kept_architecture_stays(tmp_path: Path) -> None:
    code = {name: bytes([number]) * 40 for number, name in enumerate(("sm_80", "sm_90", "ptx 90"), 65)}
    first = fat_binary((2, 80, code["sm_80"]), (2, 90, code["sm_90"]), (1, 90, code["ptx 90"]))
    by_chance = trim_fatbin.MAGIC + b"\0" * 12
    library = b"ELF" + by_chance + first + b"between" + fat_binary((2, 80, code["sm_80"])) + b"the end"
    (tmp_path / "library.so").write_bytes(library)
    command = [
        sys.executable,
        str(PROGRAM.parent / "trim_fatbin.py"),
        str(tmp_path / "library.so"),
        str(tmp_path / "small.so"),
        "--keep",
    ]
    ended = subprocess.run([*command, "90"], capture_output=True, text=True, check=True)
    assert (tmp_path / "small.so").read_bytes() == library.replace(code["sm_80"], bytes(40)).replace(code["ptx 90"], bytes(40))
    assert [line.split()[-1] for line in ended.stdout.splitlines()] == ["blanked", "blanked", "kept"]
    (tmp_path / "small.so").unlink()
    refused = subprocess.run([*command, "100"], capture_output=True, text=True, check=False)
    assert (
        refused.returncode == 2 and "no machine code for --keep 100" in refused.stderr and not (tmp_path / "small.so").exists()
    )
