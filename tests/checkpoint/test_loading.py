"""Verifying a checkpoint, however large it is, is a phase in which a run may be told to leave."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from megatron_salt.checkpoint import integrity, loading
from megatron_salt.checkpoint.integrity import FileSum
from megatron_salt.errors import LeftEarly
from tests.support.checkpoint_runs import Run, job
from tests.support.program import train, write_tokens
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of step 1 of a run on two ranks."""
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(2, job, Run(save=str(directory)), 2, 1, (1,))
    return directory / "iter_0000001"


def looks_and_files(directory: Path) -> tuple[int, list[str]]:
    """How often this rank looks for a reason to leave while it opens the checkpoint, and the files that it hashes. In every rank."""
    looks, hashed = [], []

    def damaged_files(directory: Path, sums: Mapping[str, FileSum]) -> list[str]:
        hashed.extend(sums)
        return original(directory, sums)

    original = integrity.damaged_files
    with mock.patch.object(integrity, "damaged_files", damaged_files):
        assert loading.open_checkpoint(directory, fallback=False, look=looks.append) is not None
    return len(looks), hashed


def test_ranks_share_the_files_and_look_equally_often_for_a_reason_to_leave(saved: Path) -> None:
    names = sorted(integrity.read_checksums(saved))
    ((looks, first), (other_looks, second)) = run_ranks(2, looks_and_files, saved)
    assert sorted([*first, *second]) == names
    assert looks == other_looks == math.ceil(len(names) / 2)


def files_until_a_reason(directory: Path) -> int:
    """How many files this rank has hashed where there is a reason to leave at once. In every rank."""

    def look(doing: str) -> None:
        assert doing == f"verifying {directory}"
        raise LeftEarly("told to leave")

    with mock.patch.object(integrity, "damaged_files", return_value=[]) as hashed, pytest.raises(LeftEarly):
        loading.open_checkpoint(directory, fallback=False, look=look)
    return hashed.call_count


def test_a_reason_to_leave_ends_the_verification_after_one_file_of_each_rank(saved: Path) -> None:
    assert run_ranks(2, files_until_a_reason, saved) == [1, 1]


@contextlib.contextmanager
def a_file_appears_while_files_are_verified(path: Path) -> Iterator[None]:
    """As if somebody asked the run to leave in the middle of a large checkpoint."""

    def damaged_files(directory: Path, sums: Mapping[str, FileSum]) -> list[str]:
        path.touch()
        return original(directory, sums)

    original = integrity.damaged_files
    with mock.patch.object(integrity, "damaged_files", damaged_files):
        yield


@pytest.mark.parametrize("in_place", [True, False])
def test_a_run_that_is_told_to_leave_while_it_verifies_its_checkpoint_leaves_then(tmp_path: Path, in_place: bool) -> None:
    """Whether the checkpoint lies in --save or elsewhere, which are opened at different times."""
    save, file, outcome = tmp_path / "save", tmp_path / "leave", tmp_path / "outcome"
    flags = dict(data_path=write_tokens(tmp_path / "words"), load=save, save=save if in_place else tmp_path / "new")
    train(2, **flags | dict(load=None, save=save), train_iters=4, exit_interval=1)
    train(
        2, **flags, train_iters=4, exit_file=file, outcome_file=outcome, within=partial(a_file_appears_while_files_are_verified, file)
    )  # fmt: skip
    assert outcome.read_text().startswith("left - ") and f"while verifying {save / 'iter_0000001'}" in outcome.read_text()
