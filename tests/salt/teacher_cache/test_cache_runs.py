"""Runs that write and read one cache learn what they learn from the live teacher, bit for bit."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_salt import pretrain
from megatron_salt.model.flops import forward_flops_per_token, head_flops
from megatron_salt.salt.teacher_cache.manifest import read_manifest
from megatron_salt.salt.teacher_cache.shards import Index, SampleShape, open_shard, shard_names
from megatron_salt.salt.teacher_checkpoint import read_teacher
from tests.support.program import argv, entries, numbers, refused, tensors, train, write_tokens
from tests.support.selections import write_ids

STEPS, KD_STEPS = 4, 3
GLOBAL_BATCH = 8
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
CP2 = dict(context_parallel_size=2)
DP2 = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
TEACHER_TP2 = dict(teacher_tensor_model_parallel_size=2)
TEACHER_PP2 = dict(teacher_pipeline_model_parallel_size=2)


def salt(data: str, teacher: Path, **flags: Any) -> dict[str, Any]:
    """Flags of a run of four steps, of which three have the teacher."""
    return dict(data_path=data, train_iters=STEPS, teacher_load=teacher, kd_steps=KD_STEPS) | flags


def taught(save: Path) -> list[tuple[Any, ...]]:
    """The figures of teacher and student for every step of stage 1."""
    names = ("step", "kd_weight", "ce", "kl", "teacher_ce", "agreement")
    return [tuple(entry[name] for name in names) for entry in entries(save) if "kd_weight" in entry]


def shares(save: Path) -> list[float]:
    """What share of each step's samples came from the cache."""
    return [entry["teacher_cached"] for entry in entries(save) if "kd_weight" in entry]


def totals(save: Path) -> dict[str, Any]:
    """What the run did with its cache."""
    (found,) = [entry["teacher_cache"] for entry in entries(save, "event") if "teacher_cache" in entry]
    return found


def same(one: Path, other: Path) -> None:
    """Both runs have the same losses, gradients, teacher's figures and last checkpoint, bit for bit."""
    assert numbers(one) == numbers(other) and taught(one) == taught(other) and len(taught(one)) == KD_STEPS
    assert tensors(one, STEPS) == tensors(other, STEPS)


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(1, dict(), id="serial"),
        pytest.param(2, dict(TP2, **TEACHER_PP2), id="tp2, teacher pp2"),
        pytest.param(2, dict(PP2, **TEACHER_TP2, bf16=True), id="pp2 bf16, teacher tp2"),
        pytest.param(2, dict(DP2, teacher_micro_batch_size=4), id="dp2, merged", marks=pytest.mark.long),
        pytest.param(2, dict(CP2, **TEACHER_TP2), id="cp2, teacher tp2", marks=pytest.mark.long),
        pytest.param(4, dict(TP2, **CP2, bf16=True), id="tp2cp2 bf16, four teachers", marks=pytest.mark.full),
        pytest.param(4, dict(TP2, **PP2, **TEACHER_TP2), id="tp2pp2, two teachers of tp2", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_curves_are_those_of_the_live_teacher(
    tmp_path: Path, data: str, teacher: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """The first run writes, the second reads and never loads the teacher's layers."""
    flags = salt(data, teacher, **flags)
    train(world_size, **flags, save=tmp_path / "cold", teacher_cache=tmp_path / "cache")
    warm = train(world_size, **flags, save=tmp_path / "warm", teacher_cache=tmp_path / "cache")
    same(tmp_path / "warm", tmp_path / "cold")
    if world_size == 1:  # to write changes nothing
        train(world_size, **flags, save=tmp_path / "live")
        same(tmp_path / "cold", tmp_path / "live")
    assert "the teacher's layers are not loaded" in warm.err
    assert shares(tmp_path / "cold") == [0.0] * KD_STEPS and shares(tmp_path / "warm") == [1.0] * KD_STEPS
    cold, read = totals(tmp_path / "cold"), totals(tmp_path / "warm")
    samples, width = KD_STEPS * GLOBAL_BATCH, 2 if flags.get("bf16") else 4
    assert cold["samples_written"] == samples and cold["bytes_read"] == cold["samples_cached"] == read["samples_written"] == 0
    assert (
        read["samples_cached"] == samples and read["bytes_read"] == samples * 16 * 16 * width
    )  # each position once: tokens, hidden size


# ---- with a cache that is there ----------------------------------------------------------------------------------------

EVALUATED = dict(valid_share=0.3, eval_iters=1, eval_interval=2)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, data: str, teacher: Path) -> Path:
    """A run and its cache, with the teacher's figures on held-out data."""
    home = tmp_path_factory.mktemp("filled")
    train(1, **salt(data, teacher, **EVALUATED), save=home / "run", teacher_cache=home / "cache")
    return home


@pytest.fixture
def cache(tmp_path: Path, filled: Path) -> Path:
    """A copy of that cache."""
    return Path(shutil.copytree(filled / "cache", tmp_path / "cache"))


def index_of(cache: Path) -> Index:
    manifest = read_manifest(cache)
    assert manifest is not None
    shape = SampleShape(16, 16, "float32", manifest.key)
    return Index([open_shard(cache / name, shape) for name in shard_names(cache)], shape)


def evaluations(save: Path) -> list[dict[str, Any]]:
    """Every evaluation, without its times."""
    return [{key: value for key, value in entry.items() if key not in ("time", "seconds")} for entry in entries(save, "eval")]


def teacher_flops(save: Path) -> float:
    return entries(save)[-1]["teacher_flops"]


def test_weight_temperature_and_schedule_may_differ_and_the_teacher_is_not_evaluated_again(
    tmp_path: Path, data: str, teacher: Path, cache: Path
) -> None:
    """Also with a stage 1 that ends at a crossover. The FLOPs of the teacher's layers do not count, those of its output layer do."""
    flags = salt(
        data, teacher, **EVALUATED, kd_weight=0.3, kd_teacher_temperature=1.0, kd_stop="crossover", kd_stop_margin=-1.0
    )
    train(1, **flags, save=tmp_path / "live")
    shutil.copytree(teacher, tmp_path / "teacher")
    warm = train(1, **flags | dict(teacher_load=tmp_path / "teacher"), save=tmp_path / "warm", teacher_cache=cache)
    assert numbers(tmp_path / "warm") == numbers(tmp_path / "live") and taught(tmp_path / "warm") == taught(tmp_path / "live")
    assert tensors(tmp_path / "warm", STEPS) == tensors(tmp_path / "live", STEPS)
    assert evaluations(tmp_path / "warm") == evaluations(tmp_path / "live")
    assert len(taught(tmp_path / "warm")) == 2 and "teacher_loss" in evaluations(tmp_path / "warm")[0]
    assert "the teacher's layers are not loaded" in warm.err and "is gone in" in warm.out
    model = read_teacher(str(teacher)).model
    tokens, rows = 2 * GLOBAL_BATCH * 16, 384
    assert teacher_flops(tmp_path / "warm") == pytest.approx(tokens * head_flops(model, rows))
    assert teacher_flops(tmp_path / "live") == pytest.approx(tokens * forward_flops_per_token(model, 16, rows))


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(2, dict(PP2, **DP2), id="pp2: two teachers"),
        pytest.param(2, DP2, id="dp2", marks=pytest.mark.full),
        pytest.param(4, dict(TP2, **PP2), id="tp2pp2: four teachers", marks=pytest.mark.full),
    ],
)
def test_steps_of_which_the_cache_holds_a_part_are_the_same_up_to_rounding(
    tmp_path: Path, data: str, teacher: Path, cache: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """Another seed has another order: in its microbatches some samples are cached and others are not. One rank filled the cache."""
    flags = salt(data, teacher, **EVALUATED, **flags, seed=4321)
    train(world_size, **flags, save=tmp_path / "live")
    before = set(index_of(cache).shards[0].ids.tolist())
    train(world_size, **flags, save=tmp_path / "part", teacher_cache=cache)
    assert all(0 < share < 1 for share in shares(tmp_path / "part")), shares(tmp_path / "part")
    for here, there in zip(taught(tmp_path / "part"), taught(tmp_path / "live"), strict=True):
        assert here == pytest.approx(there, rel=0, abs=3e-6)
    counted, drawn = totals(tmp_path / "part"), KD_STEPS * GLOBAL_BATCH
    assert counted["samples_cached"] + counted["samples_written"] == drawn
    assert len(index_of(cache)) == len(before) + counted["samples_written"]
    warm = train(world_size, **flags, save=tmp_path / "warm", teacher_cache=cache)
    assert "the teacher's layers are not loaded" in warm.err and shares(tmp_path / "warm") == [1.0] * KD_STEPS
    assert teacher_flops(tmp_path / "warm") < teacher_flops(tmp_path / "part") < teacher_flops(tmp_path / "live")


def test_a_selection_shares_what_others_have_drawn(tmp_path: Path, data: str, teacher: Path, cache: Path) -> None:
    """A sample has one number, whichever order draws it."""
    ids = sorted(index_of(cache).shards[0].ids.tolist())
    flags = salt(data, teacher, **EVALUATED, stage1_selection=write_ids(tmp_path / "chosen", [data], 16, ids), seed=4321)
    train(1, **flags, save=tmp_path / "live")
    train(1, **flags, save=tmp_path / "warm", teacher_cache=cache)
    assert shares(tmp_path / "warm") == [1.0] * KD_STEPS
    for here, there in zip(taught(tmp_path / "warm"), taught(tmp_path / "live"), strict=True):
        assert here == pytest.approx(there, rel=0, abs=3e-6)


def test_a_run_that_is_interrupted_in_stage_1_or_begun_again_has_the_same_bits(
    tmp_path: Path, data: str, teacher: Path, filled: Path
) -> None:
    """Resumed from its checkpoint, with a cache of the steps that are done; and from step 0 with a cache that ends in the middle."""
    flags = salt(data, teacher, **EVALUATED)
    train(1, **flags, save=tmp_path / "run", teacher_cache=tmp_path / "cache", exit_interval=2)
    assert totals(tmp_path / "run")["samples_written"] == 2 * GLOBAL_BATCH
    again = Path(shutil.copytree(tmp_path / "cache", tmp_path / "again"))
    train(1, **flags, save=tmp_path / "run", load=tmp_path / "run", teacher_cache=tmp_path / "cache")
    same(tmp_path / "run", filled / "run")
    assert len(index_of(tmp_path / "cache")) == KD_STEPS * GLOBAL_BATCH
    begun = train(1, **flags, save=tmp_path / "begun", teacher_cache=again)
    same(tmp_path / "begun", filled / "run")
    assert shares(tmp_path / "begun") == [1.0, 1.0, 0.0] and "it does not hold all samples of stage 1" in begun.err


# ---- refused, or told --------------------------------------------------------------------------------------------------


def test_a_run_that_rounds_otherwise_reads_and_adds_nothing(tmp_path: Path, data: str, teacher: Path, cache: Path) -> None:
    before = sorted(path.name for path in cache.iterdir())
    flags = salt(data, teacher, **EVALUATED, seed=4321, micro_batch_size=4)
    ended = train(1, **flags, save=tmp_path / "run", teacher_cache=cache)
    assert "(samples of a forward pass (--teacher-micro-batch-size) was 2 and is 4 here); this run reads" in ended.err
    assert totals(tmp_path / "run")["samples_cached"] > 0 == totals(tmp_path / "run")["samples_written"]
    assert sorted(path.name for path in cache.iterdir()) == before


def test_a_cache_of_other_data_is_refused_by_a_start_and_a_dry_run(
    tmp_path: Path, data: str, teacher: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = salt(write_tokens(tmp_path / "others", windows=80, seed=1), teacher, teacher_cache=cache)
    told = refused(1, **flags)
    assert told.startswith(f"--teacher-cache {cache} holds something else: fingerprint of dataset 1, ")
    assert pretrain.main([*argv(**flags), "--dry-run", "1"]) == 2
    assert told in capsys.readouterr().err


def test_a_damaged_shard_is_refused_by_name_before_the_run_or_in_it(
    tmp_path: Path, data: str, teacher: Path, cache: Path
) -> None:
    (shard,) = cache.glob("*.shard")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    flags = salt(data, teacher, **EVALUATED, teacher_cache=cache)
    assert f"--teacher-cache: {shard} is damaged: sample " in refused(1, **flags)
    shard.write_bytes(content[:-1])
    assert f"--teacher-cache: {shard} is damaged: it has {len(content) - 1} bytes" in refused(1, **flags)
    shard.unlink()
    assert "it does not hold all samples" in train(1, **flags).err


def test_a_disk_that_is_full_does_not_stop_the_run(tmp_path: Path, data: str, teacher: Path, filled: Path) -> None:
    flags = salt(data, teacher, **EVALUATED)
    ended = train(1, **flags, save=tmp_path / "run", teacher_cache=tmp_path / "cache", within=full_disk)
    same(tmp_path / "run", filled / "run")
    assert ended.err.count("cannot be written (No space left on device); the training goes on") == 1
    assert totals(tmp_path / "run")["samples_written"] == 0 and len(index_of(tmp_path / "cache")) == 0


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("megatron_salt.salt.teacher_cache.writer.write_shard", side_effect=full):
        yield
