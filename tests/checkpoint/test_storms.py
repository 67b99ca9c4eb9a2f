"""Many kills of one SALT run, and every kind of damage to every file of its checkpoint. Only in `make test-faults`.

test_kill.py and test_faults.py hold the short forms. What was counted is printed at the end of the tests.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.checkpoint import integrity, save_directory
from tests.checkpoint.test_kill import has_logged, is_saving, kill, saves_again, wait_until
from tests.support.checkpoint_runs import flip
from tests.support.program import DROPOUT, begin, checkpoints, losses, numbers, run, tensors, the_error, train, write_tokens

SECONDS = 60.0  # of killing
STEPS, SWITCH = 120, 20  # of a run, and of its stage 1
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
SHARDED = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def salt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The flags of a run with a teacher that has learnt something."""
    folder = tmp_path_factory.mktemp("salt")
    data = write_tokens(folder / "words")
    train(data_path=data, hidden_size=16, ffn_hidden_size=48, train_iters=6, lr=3e-2, save=folder / "teacher")
    return dict(DROPOUT, data_path=data, teacher_load=folder / "teacher", kd_steps=SWITCH, train_iters=STEPS)


@pytest.mark.parametrize("world_size, flags", [(1, {}), (2, TP2), (2, SHARDED)], ids=["tp1", "tp2", "distributed optimizer"])
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    tmp_path: Path, record_property: Callable[[str, object], None], salt: dict[str, Any], world_size: int, flags: dict[str, Any]
) -> None:
    """With async saves, and with the end of stage 1 in the middle of the run."""
    flags = salt | flags | dict(async_save=True)
    train(world_size, **flags, save=tmp_path / "one")
    save, rng, end = tmp_path / "two", random.Random(world_size), time.monotonic() + SECONDS
    again = flags | dict(save=save, load=save, save_interval=2, keep_last=3)
    kills: Counter[str] = Counter()
    starts = 0
    while time.monotonic() < end and max(checkpoints(save), default=0) < STEPS - 4:
        starts += 1
        processes = begin(tmp_path, world_size, **again)
        try:
            wait = rng.choice((is_saving, has_logged, saves_again))
            wait_until(wait(save), processes[0])
            time.sleep(rng.uniform(0.0, 0.3))
            if processes[0].is_alive():
                kills["stage 1" if max(checkpoints(save), default=0) < SWITCH else "stage 2"] += 1
        finally:
            for process in processes:
                kill(process)
    train(world_size, **again)
    record_property("counts", f"{starts} starts, kills: {dict(kills)}; all {STEPS} losses and the last tensors are equal")
    assert kills["stage 1"] >= 2 and kills.total() >= 5
    assert list(losses(save)) == list(range(1, STEPS + 1))
    assert numbers(save) == numbers(tmp_path / "one")
    assert tensors(save, STEPS) == tensors(tmp_path / "one", STEPS)
    assert not [path for path in save.iterdir() if path.suffix in (".partial", ".deleting", ".replaced", ".tmp")]


# ---- damage ------------------------------------------------------------------------------------------------------------


def truncated(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halved(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, _: Path) -> None:
    flip(path, path.stat().st_size // 2)


def zeroed(path: Path, _: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def deleted(path: Path, _: Path) -> None:
    path.unlink()


def of_another_step(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


DAMAGE = (truncated, halved, flipped, zeroed, deleted, of_another_step)


def test_no_kind_of_damage_to_any_file_is_loaded(
    tmp_path: Path, record_property: Callable[[str, object], None], salt: dict[str, Any]
) -> None:
    """Damage is refused with the file's name; under --load-fallback the run goes on from the step before, bit for bit. A file that only
    looks changed is accepted."""
    flags = salt | SHARDED | dict(train_iters=4)
    train(1, **flags, save=tmp_path / "run", save_at=(2, 3))
    shutil.rmtree(save_directory.directory_of(tmp_path / "run", 4))
    save_directory.write_tracker(tmp_path / "run", 3)
    whole = losses(tmp_path / "run")[4]
    directory, before = save_directory.directory_of(tmp_path / "run", 3), save_directory.directory_of(tmp_path / "run", 2)
    names = [*integrity.read_checksums(directory), integrity.CHECKSUMS]
    log = tmp_path / "log"
    counts: Counter[str] = Counter()
    for name in names:
        for damage in DAMAGE:
            content = (directory / name).read_bytes()
            damage(directory / name, before / name)
            same = (directory / name).exists() and (directory / name).read_bytes() == content
            (ended,) = run(1, **flags, load=tmp_path / "run", jsonl=log)
            if same:
                assert ended.status == 0 and last_loss(log) == whole, (name, damage)
                counts["no change"] += 1
            else:
                assert ended.status == 2, (name, damage, ended)
                message = the_error(ended.err)
                told = (
                    directory if name == integrity.CHECKSUMS else directory / name
                )  # the other step's list makes all files wrong
                assert str(told) in message and "\n" not in message, (name, damage, message)
                counts["refused"] += 1
                if damage in (flipped, deleted):
                    (ended,) = run(1, **flags, load=tmp_path / "run", load_fallback=True, jsonl=log)
                    assert ended.status == 0 and last_loss(log) == whole, (name, damage)
                    counts["resumed from the step before"] += 1
            (directory / name).write_bytes(content)
    record_property("counts", f"{len(names)} files: {dict(counts)}; none was loaded")


def last_loss(log: Path) -> float:
    entry = json.loads([line for line in log.read_text().splitlines() if '"kind": "step"' in line][-1])
    assert entry["step"] == 4
    return entry["loss"]
