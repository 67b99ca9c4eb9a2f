"""Teachers that do not fit, are damaged or have changed: exit status 2, one line with flag, file and numbers, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoint_runs import flip, rewrite
from tests.support.program import losses, refused, refused_at_once, train

PP2 = dict(pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A directory with one checkpoint of the small run."""
    save = tmp_path_factory.mktemp("teacher")
    train(data_path=data, train_iters=2, save=save)
    return save


PP3 = dict(pipeline_model_parallel_size=3, num_layers=3)


def another_tokenizer(root: Path) -> list[str]:
    rewrite(root / "iter_0000002", tokenizer="sha256:other")
    return [f"{root}/iter_0000002 was trained with tokenizer sha256:other, and ", "/tokenizer holds "]


def no_checkpoint(root: Path) -> list[str]:
    shutil.rmtree(root)
    return [f"{root} holds no checkpoint"]


def no_probe(root: Path) -> list[str]:
    rewrite(root / "iter_0000002", probe=None)
    return [f"{root}/iter_0000002 has no record of its own loss"]


def no_table(root: Path) -> list[str]:
    (root / "iter_0000002" / "checksums.json").unlink()
    return [f"{root}/iter_0000002/checksums.json: is missing", "no whole checkpoint of megatron_salt"]


def as_it_was(root: Path) -> list[str]:
    return [f"{root}"]


@pytest.mark.parametrize(
    "world_size, spoil, flags, words",
    [
        (1, another_tokenizer, {}, []),
        (1, no_checkpoint, {}, []),
        (1, no_probe, {}, []),
        (1, no_table, {}, []),
        (1, as_it_was, dict(seq_length=20), ["--seq-length 16", "--seq-length 20"]),
        (3, as_it_was, dict(PP3, teacher_tensor_model_parallel_size=3),
         ["--num-attention-heads 4 is not divisible by --teacher-tensor-model-parallel-size = 3"]),
        (3, as_it_was, dict(PP3, teacher_pipeline_model_parallel_size=3),
         ["--num-layers 2 is not divisible by --teacher-pipeline-model-parallel-size", "= 3"]),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, teacher: Path, world_size: int,
    spoil: Callable[[Path], list[str]], flags: dict[str, Any], words: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    root = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    words = [*spoil(root), *words]
    flags = dict(data_path=data, train_iters=4, teacher_load=root, kd_steps=3) | flags
    message = refused_at_once(capsys, tmp_path / "save", **flags)
    assert "--teacher-load" in message and all(word in message for word in words), message


def test_what_is_found_of_a_teacher_once_ranks_have_met(tmp_path: Path, data: str, teacher: Path) -> None:
    """A damaged file, or an exchange beyond its limit: every rank refuses before the first step, and nothing is written."""
    root = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    flags = dict(PP2, data_path=data, train_iters=4, teacher_load=root, kd_steps=3, save=tmp_path / "save")
    message = refused(2, **flags, teacher_exchange_max_gib=1e-6)
    for word in ("--teacher-exchange-max-gib 1e-06", "x 2 samples x 32 x 4 bytes", "4 microbatches of 16 tokens", "GiB"):
        assert word in message, message
    (shard,) = (root / "iter_0000002").glob("*.distcp")
    flip(shard, 1000)
    message = refused(2, **flags)
    assert message.startswith("--teacher-load: ") and f"{shard}: has sha256" in message and "--load-fallback" not in message
    assert list((tmp_path / "save").iterdir()) == []


def test_a_run_goes_on_with_its_own_teacher_or_not_at_all(tmp_path: Path, data: str, teacher: Path) -> None:
    """In stage 1. A plain run cannot continue with a teacher, but a run with a teacher may start from its weights."""
    train(data_path=data, train_iters=2, save=tmp_path / "other")
    flags = dict(data_path=data, train_iters=4, kd_steps=3, save=tmp_path / "save")
    train(**flags, teacher_load=teacher, exit_interval=2)
    before = sorted(tmp_path.rglob("*"))
    message = refused(**flags, load=tmp_path / "save", teacher_load=tmp_path / "other")
    saved, current = f"(then in {teacher}/iter_0000002)", f"--teacher-load {tmp_path / 'other'}/iter_0000002 is sha256:"
    for word in (saved, current, "step 2 is in stage 1"):
        assert word in message, message
    message = refused(**flags, load=tmp_path / "other", teacher_load=teacher)
    assert "was trained without a teacher up to step 2" in message and "--finetune" in message and "--teacher-load" in message
    assert sorted(tmp_path.rglob("*")) == before
    train(**flags | dict(save=tmp_path / "tuned"), load=tmp_path / "other", finetune=True, teacher_load=teacher)
    assert losses(tmp_path / "tuned").keys() == {1, 2, 3, 4}
