"""What goes wrong with checkpoints: damage, crashes, full disks and strangers' files."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_salt.checkpoint import async_writer, integrity, safe_unpickle, save_directory
from megatron_salt.errors import SaveError, UserError
from tests.checkpoint.test_checkpointer import state_of
from tests.checkpoint.test_other_runs import refusal
from tests.support.checkpoint_runs import Run, at, flip, job, start
from tests.support.ranks import run_ranks

# ---- damage ------------------------------------------------------------------------------------------------------------


def test_damage_to_any_file_is_found_and_only_load_fallback_steps_over_it(tmp_path: Path) -> None:
    run_ranks(2, job, Run(save=str(tmp_path)), 2, 2, (1, 2))
    directory = save_directory.directory_of(tmp_path, 2)
    names = [*integrity.read_checksums(directory), integrity.CHECKSUMS]
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", "run.yaml"} < set(names)
    messages = run_ranks(2, refusals_of_damage, Run(load=str(tmp_path)), names)
    assert messages[0] == messages[1]
    for name, message in zip(names, messages[0], strict=True):
        assert f"{directory / name}: " in message
        assert f"--load-fallback would resume from {save_directory.directory_of(tmp_path, 1)}" in message
        assert name == integrity.CHECKSUMS or str(integrity.sum_of_file(directory / name)) in message
    flip(directory / "__1_0.distcp", 1000)
    resumed = run_ranks(2, job, Run(load=str(tmp_path), flags={"load_fallback": True}), 2, 2)
    assert resumed[0].progress is not None and resumed[0].progress.step == 1
    flip(save_directory.directory_of(tmp_path, 1) / "state.json", 10)
    assert "iter_0000001 is damaged" in refusal(2, Run(load=str(tmp_path), flags={"load_fallback": True}))


def refusals_of_damage(run: Run, names: list[str]) -> list[str]:
    """The messages of this rank for one flipped byte in each of the files. In every rank."""
    import torch.distributed as dist

    from megatron_salt.checkpoint import loading

    messages = []
    assert run.load is not None
    for name in names:
        path = save_directory.directory_of(Path(run.load), 2) / name
        whole = path.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            flip(path, len(whole) // 2)
        dist.barrier()
        with pytest.raises(integrity.DamagedCheckpoint) as caught:
            loading.open_checkpoint(Path(run.load), fallback=False)
        messages.append(str(caught.value))
        dist.barrier()
        if dist.get_rank() == 0:
            path.write_bytes(whole)
    return messages


def test_a_strangers_metadata_with_true_checksums_is_refused_before_it_runs(tmp_path: Path) -> None:
    run_ranks(1, job, Run(save=str(tmp_path)), 1, 1, (1,))
    directory, marker = save_directory.directory_of(tmp_path, 1), tmp_path / "marker"
    metadata = safe_unpickle.read_metadata(directory)
    metadata.planner_data = _Command(marker)
    (directory / integrity.METADATA).write_bytes(pickle.dumps(metadata))
    sums = integrity.read_checksums(directory)
    integrity.write_checksums(directory, {name: integrity.sum_of_file(directory / name) for name in sums})
    assert "system" in refusal(1, Run(load=str(tmp_path)))
    assert not marker.exists()


class _Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


# ---- crashes and full disks ----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("async_save", [False, True])
def test_killed_at_any_moment_of_saving_the_last_good_checkpoint_stands(tmp_path: Path, async_save: bool) -> None:
    """kill -9 of a run that mostly saves, at three random moments. Each next run goes on from what was left."""
    run_ranks(1, job, Run(save=str(tmp_path)), 1, 1, (1,))
    rng, seen = random.Random(int(async_save)), [1]
    context = multiprocessing.get_context("forkserver")
    for _ in range(3):
        process = context.Process(target=save_for_ever, args=(str(tmp_path), async_save))
        process.start()
        deadline = time.monotonic() + 120
        while save_directory.read_tracker(tmp_path) == seen[-1] and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        assert process.pid is not None and process.is_alive()
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        newest = save_directory.candidates(tmp_path)[0]
        seen.append(int(newest.name[5:]))
        assert integrity.damaged_files(newest, integrity.read_checksums(newest)) == []
    assert seen == sorted(set(seen))
    (resumed,) = run_ranks(1, job, Run(load=str(tmp_path), save=str(tmp_path)), 1, 0)
    assert resumed.progress.step == seen[-1]
    assert all(path.suffix in ("", ".txt") for path in tmp_path.iterdir()), "leftovers are cleared up"


def save_for_ever(directory: str, async_save: bool) -> None:
    """One rank that resumes, then trains and saves every step. In a process of its own."""
    import torch.distributed as dist

    os.setpgrp()  # so that the writers die with it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    flags = {"async_save": async_save, "keep_last": 2, "load_fallback": False}
    job(Run(save=directory, load=directory, flags=flags), 1, 10**6, tuple(range(10**4)))


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_on_a_full_disk(run: Run, full: str) -> str:
    """Save, fail to save while the disk is full for one rank, save again; returns the error. In every rank."""
    import torch.distributed as dist

    from tests.support.small import train_student

    student, checkpointer, _ = start(run, dist.get_world_size())
    train_student(student, run.case, 1, 0)
    checkpointer.save(at(1))
    checkpointer.finish()
    train_student(student, run.case, 1, 1)
    message = ""
    try:
        with contextlib.ExitStack() as stack:
            if full == "shards" and dist.get_rank() == 1:
                stack.enter_context(small_files(20_000))
            elif full == "companions" and dist.get_rank() == 0:
                stack.enter_context(small_files(1_000))
            elif full == "metadata" and dist.get_rank() == 0:
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(FileSystemWriter, "finish", _fail)
            elif full == "tracker" and dist.get_rank() == 0:
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(save_directory, "write_tracker", _fail)
            checkpointer.save(at(2))
            checkpointer.finish()
    except UserError as error:
        message = str(error)
    checkpointer.save(at(2))
    checkpointer.finish()
    return message


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.long
@pytest.mark.parametrize("full", ["companions", "metadata", "tracker", "shards"])
@pytest.mark.parametrize("flags", [{}, {"async_save": True}])
def test_a_full_disk_stops_the_run_on_every_rank_and_the_last_good_checkpoint_stands(
    tmp_path: Path, full: str, flags: dict
) -> None:
    zero, one = run_ranks(2, save_on_a_full_disk, Run(save=str(tmp_path / "a"), flags=flags), full, timeout=60)
    assert (
        zero == one and "saving step 2" in zero and f"failed on rank {int(full == 'shards')}: " in zero and "GiB free" in zero
    )
    assert f"{save_directory.directory_of(tmp_path / 'a', 1)} stands" in zero or full == "tracker"
    assert run_ranks(2, job, Run(load=str(tmp_path / "a")), 2, 2)[0].progress.step == 2, "saving goes on when there is room"


@pytest.mark.parametrize("flags", [{}, {"async_save": True}])
def test_with_on_save_error_continue_the_run_goes_on(tmp_path: Path, flags: dict) -> None:
    run = Run(save=str(tmp_path), flags={**flags, "on_save_error": "continue"})
    assert run_ranks(2, save_on_a_full_disk, run, "shards", timeout=60) == ["", ""]
    assert sorted(save_directory.whole_checkpoints(tmp_path)) == [1, 2]


@pytest.mark.parametrize("victim", ["the process of the shards", "the process around it", "the process after it has written"])
@pytest.mark.parametrize("flags", [{}, {"async_save": True}])
def test_a_writing_process_that_is_killed_is_a_save_that_failed(tmp_path: Path, flags: dict, victim: str) -> None:
    zero, one = run_ranks(2, save_while_writers_are_killed, Run(save=str(tmp_path), flags=flags), victim, timeout=60)
    assert zero == one and "saving step 2" in zero
    assert "failed on rank 1: the process that writes the checkpoint died (signal 9; out of memory?)" in zero
    assert sorted(save_directory.whole_checkpoints(tmp_path)) == [1, 3], "saving goes on when nobody is killed"


def save_while_writers_are_killed(run: Run, victim: str) -> str:
    """Save, lose a process of rank 1's second save, save again; returns the error. In every rank."""
    import torch.distributed as dist

    _, checkpointer, _ = start(run, dist.get_world_size())
    checkpointer.save(at(1))
    checkpointer.finish()
    places: dict[str, tuple[object, str]] = {
        "the process of the shards": (FileSystemWriterAsync, "write_preloaded_data"),
        "the process around it": (FileSystemWriterAsync, "write_preloaded_data_multiproc"),
        "the process after it has written": (async_writer, "sum_of_file"),
    }
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 1:
            place, name = places[victim]
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(place, name, staticmethod(_die))
        with pytest.raises(SaveError) as caught:
            checkpointer.save(at(2))
            checkpointer.finish()
    checkpointer.save(at(3))
    checkpointer.finish()
    return str(caught.value)


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_save_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(2, Run(save=str(tmp_path / "file" / "below")), until=0)
    assert "--save" in message and "Not a directory" in message


# ---- what stays --------------------------------------------------------------------------------------------------------


def save_six(run: Run) -> None:
    _, checkpointer, _ = start(run, 1)
    for step in range(1, 7):
        checkpointer.save(at(step), name="stage 1 ends" if step == 3 else None, final=step == 6)
    checkpointer.finish()


def test_the_last_ones_and_the_named_ones_are_kept(tmp_path: Path) -> None:
    run_ranks(1, save_six, Run(save=str(tmp_path), flags={"keep_last": 2, "async_save": True}))
    assert sorted(save_directory.whole_checkpoints(tmp_path)) == [3, 5, 6] and save_directory.read_tracker(tmp_path) == 6
    forms = [state_of(tmp_path, step)["optimizer"]["form"] for step in (3, 5, 6)]
    assert forms == ["fully_reshardable", "dp_reshardable", "fully_reshardable"]
    run_ranks(1, save_six, Run(save=str(tmp_path), load=str(tmp_path / "iter_0000003"), flags={"keep_last": 1}))
    assert sorted(save_directory.whole_checkpoints(tmp_path)) == [3, 6], "saving a step again replaces it"
