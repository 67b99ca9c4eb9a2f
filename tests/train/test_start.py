"""Mistakes of flags and files together: a start and a --dry-run refuse them with the same line, before anything is written."""

from __future__ import annotations

import importlib.util
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_salt.checkpoint import loading, sharded_state
from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.parallel.layout import Layout, student_layout
from megatron_salt.train.start import (
    host_memory_of_save,
    parameters_of_rank,
    reshardable_load_bytes,
    reshardable_save_bytes,
)
from tests.support.checkpoint_runs import Run, job, start
from tests.support.program import refused, run, train, write_tokens
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, SEQ_LENGTH, VOCABULARY, Case, build_student, train_student

DISTRIBUTED = dict(use_distributed_optimizer=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """plain: 3 steps; salt: left inside stage 1, its teacher is plain; sharded: a routine save; the others: damaged copies of plain."""
    root = tmp_path_factory.mktemp("runs")
    train(data_path=data, train_iters=3, save=root / "plain", save_interval=2)
    train(data_path=data, train_iters=6, save=root / "salt", exit_interval=2, teacher_load=root / "plain", kd_steps=4)
    train(data_path=data, train_iters=4, save=root / "sharded", exit_interval=2, **DISTRIBUTED)
    for name, file in (("cut", "common.pt"), ("scribbled", "state.json")):
        shutil.copytree(root / "plain", root / name)
        (root / name / "iter_0000003" / file).write_bytes(b"{")
    shutil.copytree(root / "plain", root / "lost")
    shutil.rmtree(root / "lost" / "iter_0000003")
    write_tokens(root / "other", seed=7)
    write_tokens(root / "few", windows=3)
    for suffix in (".bin", ".idx"):
        (root / f"link{suffix}").symlink_to(root / f"few{suffix}")
    return root


REFUSED: list[Any] = [  # flags, what the line says
    # data
    (dict(data_path="ROOT/nowhere"), "--data-path ROOT/nowhere: ROOT/nowhere.idx does not exist"),
    (dict(eval_iters=1), "--eval-iters 1 needs held-out data"),
    (dict(data_path="ROOT/few", valid_share=0.5, seq_length=48), "ROOT/few"),
    (dict(tokenizer_type=None), "--tokenizer-type"),
    (
        dict(data_path="ROOT/few", valid_data_path="ROOT/link"),
        "--valid-data-path ROOT/link is the same file as --data-path ROOT/few",
    ),
    # the log
    pytest.param(
        dict(wandb_project="salt"),
        "--wandb-project needs the package wandb",
        marks=pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed"),
    ),
    # the checkpoint
    (
        dict(load="ROOT/nowhere"),
        "--load ROOT/nowhere holds no checkpoint; a run starts without one only where --save is the same",
    ),
    (dict(load="ROOT/lost"), "whole checkpoints: iter_0000002. Give one of them to --load"),
    (dict(load="ROOT/cut"), "ROOT/cut/iter_0000003 is damaged"),
    (dict(load="ROOT/cut", save="ROOT/cut"), "ROOT/cut/iter_0000003 is damaged"),
    (dict(load="ROOT/scribbled"), "ROOT/scribbled/iter_0000003 is damaged"),
    (dict(load="ROOT/scribbled", save="ROOT/scribbled"), "ROOT/scribbled/iter_0000003 is damaged"),
    (dict(load="ROOT/plain", num_layers=3), "another architecture: --num-layers is 2 there and 3 here"),
    (dict(load="ROOT/plain", seed=5), "--new-data goes on with it"),
    (dict(load="ROOT/plain", data_path="ROOT/other"), "--new-data goes on with it"),
    (dict(load="ROOT/plain", lr=1e-3), "another schedule: max_lr is 0.003 there and 0.001 here"),
    (dict(load="ROOT/plain", lr_decay_style="cosine"), "another schedule: lr_decay_style is linear there and cosine here"),
    (dict(load="ROOT/plain", **DISTRIBUTED), "this run has --use-distributed-optimizer and the checkpoint has not"),
    (dict(load="ROOT/sharded"), "the checkpoint has --use-distributed-optimizer and this run has not"),
    (
        dict(
            load="ROOT/plain",
            train_iters=None,
            train_samples=40,
            global_batch_size=5,
            micro_batch_size=1,
            override_opt_param_scheduler=True,
        ),
        "leaves 16",
    ),
    (
        dict(load="ROOT/plain", train_iters=None, train_samples=48, profile=True, profile_step_start=7),
        "--profile-step-start 7 lies beyond the run's last step, 6",
    ),
    # the teacher
    (dict(teacher_load="ROOT/nowhere", kd_steps=1), "--teacher-load ROOT/nowhere holds no checkpoint"),
    (dict(load="ROOT/plain", teacher_load="ROOT/plain", kd_steps=5), "the run was trained without a teacher up to step 3"),
    (dict(load="ROOT/salt"), "step 2 is in stage 1, which ends after step 4: it needs its teacher"),
    (dict(load="ROOT/salt", teacher_load="ROOT/sharded", kd_steps=4), "step 2 is in stage 1 of a run with teacher"),
    (dict(load="ROOT/salt", teacher_load="ROOT/plain", kd_steps=5), "under another schedule: --kd-steps is 4 there and 5 here"),
    (dict(teacher_load="ROOT/plain", kd_steps=4, teacher_exchange_max_gib=1e-9), "more than --teacher-exchange-max-gib 1e-09"),
    # --save
    (dict(save="/proc/nowhere"), "--save /proc/nowhere cannot be written"),
    (dict(save="ROOT/plain"), "--save ROOT/plain holds checkpoints of another run"),
    (dict(save="ROOT/other.bin"), "--save ROOT/other.bin cannot be written"),
    (dict(load="ROOT/plain", train_iters=3), "nothing to train: ROOT/plain/iter_0000003 is after step 3 and the run has 3"),
    # logs
    (dict(jsonl="ROOT/other.bin"), "--jsonl ROOT/other.bin exists and is not a run's log"),
    (dict(jsonl="ROOT/plain"), "--jsonl ROOT/plain is not a regular file"),
    (dict(jsonl="ROOT/other.bin/log"), "--jsonl ROOT/other.bin/log cannot be written: ROOT/other.bin is not a directory"),
    (dict(tensorboard_dir="ROOT/other.bin"), "--tensorboard-dir ROOT/other.bin cannot be written"),
]


@pytest.mark.parametrize("flags, reason", REFUSED, ids=lambda value: value[:50] if isinstance(value, str) else "")
def test_a_start_and_a_dry_run_refuse_alike_and_write_nothing(
    tmp_path: Path, data: str, runs: Path, flags: dict[str, Any], reason: str
) -> None:
    named = {name: value.replace("ROOT", str(runs)) if isinstance(value, str) else value for name, value in flags.items()}
    named = dict(data_path=data, train_iters=6, save=tmp_path / "new") | named
    before = files(runs)
    said = [refused(**named), refused(**named, dry_run=1)]
    assert said[0] == said[1] and reason.replace("ROOT", str(runs)) in said[0], said
    assert list(tmp_path.iterdir()) == [] and files(runs) == before


@pytest.mark.parametrize(
    "flags",
    [
        dict(load="plain", lr=1e-3, override_opt_param_scheduler=True),
        dict(load="plain", finetune=True, seed=5),
        dict(load="scribbled", load_fallback=True),
        dict(load="salt", teacher_load="plain", kd_steps=4),
        dict(load="sharded", no_load_optim=True),
    ],
)
def test_neither_refuses_what_flags_allow(tmp_path: Path, data: str, runs: Path, flags: dict[str, Any]) -> None:
    """Without this test, the tests above could pass for the wrong reason."""
    named = {name: runs / value if name in ("load", "teacher_load") else value for name, value in flags.items()}
    [rehearsed] = run(data_path=data, train_iters=4, save=tmp_path / "new", dry_run=1, **named)
    assert rehearsed.status == 0 and "nothing found that would stop this run" in rehearsed.out, rehearsed
    assert list(tmp_path.iterdir()) == []
    [started] = run(data_path=data, train_iters=4, save=tmp_path / "new", **named)
    assert started.status == 0, started


def files(root: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time of change)} of every file below a directory."""
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


# ---- host memory of a save that loads under any layout ------------------------------------------------------------------


class HostMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        old = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        made = operation(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and not {storage := one.untyped_storage()._cdata} & (old | self.known):
                self.known.add(storage)
                self.now += (size := one.untyped_storage().nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(one.untyped_storage(), self.forget, storage, size)
        return made

    def forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def measure_a_save(case: Case, world_size: int) -> tuple[int, int]:
    """(parameters of this rank, most bytes at one time while it describes its optimizer)."""
    student = build_student(case, world_size)
    train_student(student, case, 1)
    model = sharded_state.model_state(student.chunks, student.mesh.groups)
    with HostMemory() as memory:
        sharded_state.optimizer_state(student.optimizer, model, "fully_reshardable", is_loading=False)
    return sum(parameter.numel() for chunk in student.chunks for parameter in chunk.parameters()), memory.peak


@pytest.mark.parametrize(
    "model, world_size, layout",
    [
        ("untied", 1, {}),
        ("tied", 2, {}),
        ("untied", 2, dict(tensor_model_parallel_size=2)),
        ("tied", 2, dict(pipeline_model_parallel_size=2)),
        ("untied", 1, dict(overlap_grad_reduce=True, ddp_bucket_size=10_000)),
    ],
)
def test_host_memory_of_a_save_is_predicted(model: str, world_size: int, layout: dict[str, Any]) -> None:
    """Oracle: every tensor that is made while megatron-core gathers the optimizer's state, on the rank that has most."""
    case = Case(ParallelConfig(use_distributed_optimizer=True, **layout), MODELS[model])
    measured = run_ranks(world_size, measure_a_save, case, world_size)
    parameters = parameters_of_rank(case.model, case.parallel, VOCABULARY, SEQ_LENGTH)
    assert parameters == pytest.approx(max(own for own, _ in measured), rel=0.03)
    shards = student_layout(case.parallel, world_size).data
    predicted = reshardable_save_bytes(
        parameters,
        VOCABULARY * case.model.hidden_size // case.parallel.tensor_model_parallel_size,
        case.parallel,
        shards,
    )
    peak = max(peak for _, peak in measured)
    assert 0.98 * peak < predicted < 1.15 * peak  # a tied matrix has a bucket of its own on some stages


def test_a_save_that_this_machine_cannot_hold_is_told_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    model, parallel = (
        ModelConfig(num_layers=24, hidden_size=2048, num_attention_heads=16),
        ParallelConfig(use_distributed_optimizer=True),
    )
    for gib, fits in ((2000, True), (100, False)):
        with mock.patch.object(psutil, "virtual_memory", return_value=mock.Mock(total=gib * 2**30)):
            told = host_memory_of_save(model, parallel, Layout(data=8), 50_304, 1024)
        assert told.fits is fits and f"on a node of 4; this machine has {gib}.00 GiB" in told.line
        for word in ("WARNING", "--tensor-model-parallel-size", "--overlap-grad-reduce"):
            assert (word in told.line) is not fits


def measure_a_load(run: Run, world_size: int) -> tuple[int, int]:
    """(parameters of this rank, most bytes at one time while it reads a checkpoint's tensors)."""
    memory, load_tensors = HostMemory(), loading.load_tensors

    def measured(*arguments: Any) -> None:
        with memory:
            load_tensors(*arguments)

    with mock.patch.object(loading, "load_tensors", measured):
        student, _, progress = start(run, world_size)
    assert progress is not None
    return sum(parameter.numel() for chunk in student.chunks for parameter in chunk.parameters()), memory.peak


@pytest.mark.parametrize(
    "model, world_size, layout",
    [
        pytest.param("untied", 1, {}, marks=pytest.mark.long),
        pytest.param("untied", 2, dict(tensor_model_parallel_size=2), marks=pytest.mark.long),
        ("tied", 2, dict(overlap_grad_reduce=True, ddp_bucket_size=10_000)),
    ],
)
def test_host_memory_of_a_load_is_predicted(tmp_path: Path, model: str, world_size: int, layout: dict[str, Any]) -> None:
    """Oracle: every tensor that is made while a checkpoint's tensors are read."""
    parallel = ParallelConfig(use_distributed_optimizer=True, **layout)
    run = Run(save=str(tmp_path), parallel=parallel, model=MODELS[model])
    run_ranks(world_size, job, run, world_size, 1, (1,), True)
    measured = run_ranks(world_size, measure_a_load, replace(run, save=None, load=str(tmp_path)), world_size)
    predicted = reshardable_load_bytes(max(own for own, _ in measured))
    assert predicted == pytest.approx(max(peak for _, peak in measured), rel=0.1)


def test_a_dry_run_and_a_start_tell_what_a_save_takes(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=3, save=tmp_path / "run", **DISTRIBUTED)
    (dry,) = run(1, **flags, dry_run=1)
    assert "host memory: a save that loads under any layout" in dry.out and "on a node of 1" in dry.out
    assert "host memory" not in run(1, **(flags | dict(use_distributed_optimizer=None)), dry_run=1)[0].out
    first = train(**(flags | dict(train_iters=2)))
    assert first.err.count("host memory") == 1
    for load, times in ((dict(), 1), (dict(no_load_optim=True), 0)):
        flags["load"] = flags["save"]
        (dry,) = run(1, **flags, **load, dry_run=1)
        assert dry.out.count("host memory: loading a save that loads under any layout takes about") == times
    assert train(**flags).err.count("host memory: loading a save") == 1


def test_held_out_data_that_is_not_evaluated_is_told(tmp_path: Path, data: str) -> None:
    told = "--valid-data-path is given, and nothing is evaluated on it: --eval-iters is 0"
    flags: dict[str, Any] = dict(data_path=data, valid_data_path=write_tokens(tmp_path / "held_out", seed=1), train_iters=2)
    for more in (dict[str, Any](), dict[str, Any](dry_run=1)):
        [silent, said] = run(1, **flags, eval_iters=1, **more), run(1, **flags, **more)
        assert [one.status for one in (*silent, *said)] == [0, 0], said[0].err
        assert told in said[0].out + said[0].err and told not in silent[0].out + silent[0].err
