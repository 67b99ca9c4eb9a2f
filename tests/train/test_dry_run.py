"""--dry-run refuses what a start would refuse, needs no ranks, and leaves nothing behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_salt import pretrain
from megatron_salt.cards import SHORT_NAMES
from megatron_salt.checkpoint.owner import LOCK, myself, owned
from megatron_salt.config import CheckpointConfig, RunConfig
from megatron_salt.errors import UserError
from megatron_salt.planner.command import PlanConfig
from megatron_salt.planner.gpu import Gpu
from megatron_salt.planner.planned_run import RunFlags
from megatron_salt.train.start import check_room
from tests.support.program import argv, checkpoints, refused, run, train, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A run of 2 steps, as a teacher or to be resumed."""
    save = tmp_path_factory.mktemp("trained")
    train(data_path=data, train_iters=2, save=save)
    return save


def rehearse(**flags: Any) -> str:
    [ended] = run(**{"dry_run": 4} | flags)
    assert ended.status == 0, ended
    return ended.out


def test_it_tells_what_the_run_would_be(tmp_path: Path, data: str, trained: Path) -> None:
    out = rehearse(dry_run=8, data_path=data, train_iters=5, tensor_model_parallel_size=2, save=tmp_path / "new", load=tmp_path / "new",
                   teacher_load=trained, kd_steps=2)  # fmt: skip
    assert "on 8 ranks: tensor 2, context 1, data 4, pipeline 1" in out
    assert "8 samples of 16 tokens, 1 microbatches of 2 a replica" in out
    assert f"teacher: {trained}/iter_0000002, after 2 steps" in out
    assert "5 steps, starting after step 0" in out and re.search(
        r"save: [\d.]+ GiB free, a checkpoint takes about 0.00 GiB", out
    )
    assert list(tmp_path.iterdir()) == []


def test_its_parameters_and_the_memory_of_the_head_are_those_of_a_start(tmp_path: Path, data: str) -> None:
    rehearsed, started = rehearse(data_path=data, train_iters=2), train(data_path=data, train_iters=2)
    said = re.search(r"([\d.]+M parameters)", rehearsed)
    assert said and said[1] in started.out
    head = re.search(
        r"output head on a CPU: (logits of 16 tokens at a time, [\d.]+ MiB .*)", rehearsed
    )  # 2 x 16 tokens, in 24s at most
    assert head and f"output head: {head[1]}" in started.err


@pytest.mark.parametrize("device, named", [("cpu", ["a CPU"]), ("cuda", ["a GPU"]), ("auto", ["a CPU", "a GPU"])])
def test_it_tells_the_head_of_each_device_that_the_run_may_get(data: str, device: str, named: list[str]) -> None:
    out = rehearse(data_path=data, train_iters=2, loss_chunk_tokens=None, device=device)
    assert re.findall(r"output head on (.*): logits of 32 tokens at a time", out) == named


def test_it_knows_where_a_run_goes_on(data: str, trained: Path) -> None:
    assert "5 steps, starting after step 2" in rehearse(data_path=data, train_iters=5, save=trained, load=trained)
    assert "5 steps, starting after step 0" in rehearse(data_path=data, train_iters=5, load=trained, finetune=True)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (dict(data_path="/nowhere/words"), "/nowhere/words"),
        (dict(teacher_load="/nowhere/teacher", kd_steps=1), "--teacher-load /nowhere/teacher holds no checkpoint"),
        (dict(dry_run=7), "--global-batch-size 8 is not divisible by --micro-batch-size 2 x 7"),
        (dict(dry_run=7, tensor_model_parallel_size=2), "7 ranks cannot hold whole replicas"),
        (dict(dry_run=0), "--dry-run must be at least 1 rank, got 0"),
        (dict(load="/nowhere"), "--load /nowhere holds no checkpoint; a run starts without one only where --save is the same"),
        (dict(num_layers=3, load="TRAINED"), "another architecture: --num-layers is 2 there and 3 here"),
        (dict(seed=5, load="TRAINED"), "--new-data goes on with it"),
        (dict(load="TRAINED", teacher_load="TRAINED", kd_steps=1), "the run was trained without a teacher up to step 2"),
        (dict(save="/proc/nowhere"), "--save /proc/nowhere cannot be written"),
    ],
)
def test_it_refuses_what_a_start_would(data: str, trained: Path, flags: dict[str, Any], reason: str) -> None:
    named = {name: trained if value == "TRAINED" else value for name, value in flags.items()}
    assert reason in refused(**{"data_path": data, "train_iters": 4, "dry_run": 4} | named)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_it_warns_of_a_torch_with_which_no_start_gets_a_gpu(data: str) -> None:
    assert "built without CUDA" in refused(data_path=data, train_iters=2, device="cuda")
    warned = [
        "WARNING: with this torch" in rehearse(data_path=data, train_iters=2, device=device) for device in ("cuda", "auto")
    ]
    assert warned == [True, False]


def test_on_the_cpu_it_checks_the_precision_too(data: str) -> None:
    """With --device cpu no GPU can come that this machine does not have."""
    fp8 = dict(data_path=data, train_iters=4, bf16=True, fp8_format="hybrid")
    assert refused(**fp8, dry_run=4, device="cpu") == refused(**fp8, device="cpu")
    assert "precision: not checked, there is no GPU here" in rehearse(**fp8)
    assert "precision: student: torch\n" in rehearse(data_path=data, train_iters=4, device="cpu")


def test_a_start_refuses_the_same(data: str, trained: Path) -> None:
    flags = dict(data_path=data, train_iters=4, num_layers=3, load=trained)
    assert refused(**flags) == refused(**flags, dry_run=1)


def test_a_fresh_run_into_a_used_save_is_refused_here_as_at_a_start(tmp_path: Path, data: str) -> None:
    save = tmp_path / "run"
    train(data_path=data, train_iters=4, save=save, save_interval=2)
    kept = {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    flags = dict(data_path=data, train_iters=3, save=save, save_interval=1, hidden_size=64)
    for wrong in ({}, dict(load=save, hidden_size=32, finetune=True)):
        message = refused(**flags | wrong)
        assert f"--save {save} holds checkpoints of another run (2: iter_0000002 to iter_0000004)" in message
        assert message == refused(**flags | wrong, dry_run=1)
    assert {path: path.stat().st_mtime_ns for path in save.rglob("*")} == kept
    train(**flags, keep_last=1, overwrite_save=True)
    assert checkpoints(save) == [3, 4]  # 2 became this run's own and made room; 4 is the other's
    assert "starting after step 3" in rehearse(**flags | dict(train_iters=5), load=save)


def test_room(tmp_path: Path) -> None:
    there = CheckpointConfig(save=str(tmp_path / "a/b"), keep_last=3)
    assert "WARNING" not in check_room(there, 1e-6)
    free = float(check_room(there, 1e-6).split()[1])
    assert "--keep-last 3 and the one being written" in check_room(there, free / 2)
    with pytest.raises(UserError, match="GiB free, and one checkpoint takes about"):
        check_room(there, 2 * free + 1)


def test_a_save_that_another_run_owns_is_refused_here_as_at_a_start(tmp_path: Path, data: str) -> None:
    with owned(tmp_path / "run", myself({}), take_over=False):
        for ranks in ({"dry_run": 1}, {}):
            message = refused(data_path=data, train_iters=2, save=tmp_path / "run", **ranks)
            assert f"--save {tmp_path / 'run'} is owned by process" in message and "--take-over-save" in message
            assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
        train(data_path=data, train_iters=2, save=tmp_path / "run", take_over_save=True)
        assert not (tmp_path / "run" / LOCK).exists() and (tmp_path / "run" / "iter_0000002").is_dir()


@pytest.mark.full
def test_with_a_gpu_it_ends_with_the_planners_verdict(data: str, trained: Path) -> None:
    out = rehearse(data_path=data, train_iters=5, teacher_load=trained, kd_steps=2, gpu="h100-80")
    assert "not planned" not in out and "nothing found that would stop this run" in out
    assert re.fullmatch(r"fits: 0\.0 of 80 GiB in stage 1, 0\.0 in stage 2 \(.*unmeasured\)", out.splitlines()[-1])


@pytest.mark.parametrize("fits, status", [(True, 0), (False, 2)])
def test_the_planners_verdict_decides(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fits: bool, status: int
) -> None:
    asked: list[tuple[str, int, int | None]] = []

    def planned(config: PlanConfig, gpu: Gpu, flags: RunFlags) -> tuple[bool, str]:
        asked.append((gpu.name, flags.layout.world_size, config.training.train_iters))
        return fits, "the verdict"

    monkeypatch.setattr("megatron_salt.planner.command.tell", planned)
    assert pretrain.main(argv(data_path=data, train_iters=5, dry_run=4, gpu="h100-80")) == status
    out, err = capsys.readouterr()
    assert asked == [(SHORT_NAMES["h100-80"], 4, 5)]
    assert "nothing found that would stop this run; next, its memory and time on the GPU\n" in out
    assert out.endswith("the verdict\n") if fits else err == "error: the run the verdict; flags that would help stand above\n"


def test_a_run_in_stage_2_is_planned_without_its_teacher(
    tmp_path: Path, data: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a start, the teacher may be gone by then."""
    gone = Path(shutil.copytree(trained, tmp_path / "teacher"))
    flags = dict(data_path=data, train_iters=3, teacher_load=gone, kd_steps=1, stage2_micro_batch_size=4, save=tmp_path / "run")
    train(**flags, exit_interval=2)
    shutil.rmtree(gone)
    planned: list[RunConfig] = []

    def tell(config: PlanConfig, gpu: Gpu, flags: RunFlags) -> tuple[bool, str]:
        planned.append(flags.config)
        return True, "the verdict"

    monkeypatch.setattr("megatron_salt.planner.command.tell", tell)
    assert pretrain.main(argv(**flags, load=tmp_path / "run", dry_run=2, gpu="h100-80")) == 0
    assert [(one.salt.teacher_load, one.training.micro_batch_size) for one in planned] == [(None, 4)]


def test_without_a_gpu_it_says_how_memory_is_planned(data: str) -> None:
    assert "--gpu names one for that" in rehearse(data_path=data, train_iters=5, device="auto")
    assert "--gpu" not in rehearse(data_path=data, train_iters=5, device="cpu")
    assert "--gpu h100-81 is not known (did you mean h100-80?)" in refused(
        dry_run=4, data_path=data, train_iters=5, gpu="h100-81"
    )
    assert "--gpu h100-80 needs --dry-run" in refused(data_path=data, train_iters=5, gpu="h100-80")
    assert "with --device cpu the run has none" in refused(
        dry_run=4, data_path=data, train_iters=5, gpu="h100-80", device="cpu"
    )
