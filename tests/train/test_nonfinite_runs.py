"""Numbers that are not finite are never saved, and a run that ends with them never says `done`. Whole program; one rank has them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_salt.checkpoint.run_state import ReferenceLosses
from megatron_salt.data.batch import Batches, Microbatch
from megatron_salt.errors import NonFiniteError
from megatron_salt.train import loop
from megatron_salt.train.nonfinite import no_way_out, refuse_nonfinite_losses
from megatron_salt.train.step import Student
from tests.support.program import (
    GLOBAL_BATCH,
    checkpoints,
    entries,
    losses,
    run,
    the_error,
    train,
    write_tokens,
)  # fmt: skip

OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


Spoil = Callable[[Student], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


def nan_parameter(student: Student) -> None:
    with torch.no_grad():
        list(student.chunks[0].parameters())[-1].flatten()[-1] = math.nan


def infinite_moment(student: Student) -> None:
    [*_, moments] = student.optimizer.chained_optimizers[-1].optimizer.state.values()
    moments["exp_avg_sq"].flatten()[0] = math.inf


def infinite_loss(student: Student) -> None:
    """Parameters that are finite and so large that every loss overflows."""
    with torch.no_grad():
        list(student.chunks[0].parameters())[-1].fill_(3e38)


@contextlib.contextmanager
def spoilt_after(step: int, spoil: Spoil) -> Iterator[None]:
    """Spoils a number on the last rank, as if the step had done it."""
    steps = iter(range(1, 100))

    def train_step(student: Student, *arguments: Any) -> Any:
        outcome = original(student, *arguments)
        if next(steps) == step and dist.get_rank() == dist.get_world_size() - 1:
            spoil(student)
        return outcome

    original = loop.train_step
    with mock.patch.object(loop, "train_step", train_step):
        yield


@contextlib.contextmanager
def nan_in_step(step: int) -> Iterator[None]:
    """A loss that is not finite, so that the gradient is not either; parameters stay as they are."""

    def fetch(self: Batches, consumed: int) -> list[Microbatch]:
        microbatches = original(self, consumed)
        if consumed // GLOBAL_BATCH + 1 == step:
            microbatches[0].loss_mask[0, 3] = torch.nan
        return microbatches

    original = Batches.fetch
    with mock.patch.object(Batches, "fetch", fetch):
        yield


def nonfinite(world_size: int = 1, **flags: Any) -> str:
    """The line of a run that every rank must end with status 4 and one line."""
    ended = run(world_size, **flags)
    for one in ended:
        assert one.status == 4 and one.err.count("error: ") == 1 and "Traceback" not in one.err, one
    return the_error(ended[0].err)


@pytest.mark.parametrize("world_size, spoil, named, flags", [
    (1, nan_parameter, "not finite after step 4: on rank 0 decoder.final_layernorm.weight", {}),
    (2, infinite_moment, "not finite after step 4: on rank 1 the optimizer's exp_avg_sq", dict(OVERLAP, bf16=True, async_save=True)),
    (1, infinite_loss, "after step 4 the loss on a fixed batch is not finite", {}),
])  # fmt: skip
def test_what_is_not_finite_is_never_saved_and_the_good_checkpoint_stays(
    tmp_path: Path, data: str, world_size: int, spoil: Spoil, named: str, flags: dict[str, Any]
) -> None:
    outcome, save = tmp_path / "outcome", tmp_path / "run"
    message = nonfinite(world_size, data_path=data, train_iters=4, save=save, save_interval=3, keep_last=1, outcome_file=outcome,
                        within=partial(spoilt_after, 4, spoil), **flags)  # fmt: skip
    assert named in message and f"{save}/iter_0000003 stands: go on from it, --load {save}/iter_0000003" in message, message
    assert f"--skip-samples {3 * GLOBAL_BATCH}:{4 * GLOBAL_BATCH}" in message
    assert checkpoints(save) == [3] and (save / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert outcome.read_text() == f"nonfinite - job -.0 {message}\n" and not list(save.glob("*.partial"))


def test_a_run_that_leaves_or_keeps_nothing_does_not_hide_it(tmp_path: Path, data: str) -> None:
    spoilt = partial(spoilt_after, 2, nan_parameter)
    message = nonfinite(data_path=data, train_iters=4, save=tmp_path, exit_interval=2, within=spoilt)
    assert "there is no checkpoint to go back to" in message and checkpoints(tmp_path) == []
    assert "not finite after step 2" in nonfinite(data_path=data, train_iters=2, within=spoilt)


def test_a_run_whose_last_loss_is_not_finite_is_not_done_however_often_it_is_started(tmp_path: Path, data: str) -> None:
    """The parameters are those of the step before, so the run may go on."""
    flags = dict(data_path=data, save=tmp_path, save_interval=2)
    told = (
        "1 of them up to step 3",
        "Parameters are those of step 2",
        f"{tmp_path}/iter_0000002 stands",
        "--skip-samples 16:24",
    )
    for more in (dict(within=partial(nan_in_step, 3)), dict(load=tmp_path)):
        message = nonfinite(train_iters=3, **flags, **more)
        assert all(word in message for word in told), message
    assert checkpoints(tmp_path) == [2, 3]
    train(train_iters=4, load=tmp_path, **flags)


def test_the_loss_on_the_fixed_batch_must_be_finite() -> None:
    refuse_nonfinite_losses(ReferenceLosses((8, 16), (1.0, 2.0), "float32"), 7, no_way_out)
    with pytest.raises(NonFiniteError, match="after step 7 the loss"):
        refuse_nonfinite_losses(ReferenceLosses((8, 16), (1.0, None), "float32"), 7, no_way_out)


# ---- gradients that are not finite --------------------------------------------------------------------------------------


@contextlib.contextmanager
def nan_from(first: int, last: int) -> Iterator[None]:
    """A NaN in the second microbatch of the last rank, in steps [first, last]."""

    def fetch(self: Batches, consumed: int) -> list[Microbatch]:
        microbatches = original(self, consumed)
        if first <= consumed // GLOBAL_BATCH + 1 <= last and dist.get_rank() == dist.get_world_size() - 1:
            microbatches[1].loss_mask[0, 3] = torch.nan
        return microbatches

    original = Batches.fetch
    with mock.patch.object(Batches, "fetch", fetch):
        yield


@contextlib.contextmanager
def nan_in_step_3() -> Iterator[None]:
    with nan_from(3, 3):
        yield


@contextlib.contextmanager
def nan_from_step_3_on() -> Iterator[None]:
    with nan_from(3, 99):
        yield


@pytest.mark.parametrize(
    "flags", [dict(OVERLAP), dict(OVERLAP, bf16=True), dict(bf16=True), dict(tensor_model_parallel_size=2, bf16=True)]
)
def test_a_step_without_a_finite_gradient_changes_no_parameter(tmp_path: Path, data: str, flags: dict[str, Any]) -> None:
    """The loss of the next step is that of a run that never saw the batch. Learning rate and data advance."""
    flags = dict(flags, data_path=data, train_iters=5)
    train(2, **flags, save=tmp_path / "nan", within=nan_in_step_3)
    train(2, **flags, save=tmp_path / "skip", skip_samples=f"{2 * GLOBAL_BATCH}:{3 * GLOBAL_BATCH}")
    curve, other = entries(tmp_path / "nan"), entries(tmp_path / "skip")
    assert [entry["nonfinite"] for entry in curve] == [False, False, True, False, False]
    assert curve[2]["loss"] is None and curve[2]["grad_norm"] is None
    assert (curve[3]["loss"], curve[3]["grad_norm"]) == (other[2]["loss"], other[2]["grad_norm"])
    assert [(entry["lr"], entry["consumed_samples"]) for entry in curve] == [
        (entry["lr"], entry["consumed_samples"]) for entry in other
    ]
    assert math.isfinite(curve[4]["loss"])


def test_too_many_of_them_in_a_row_end_the_run_naming_step_rank_and_microbatch(tmp_path: Path, data: str) -> None:
    """Steps are counted across a resume too, and the checkpoint before them stays."""
    flags = dict(OVERLAP, data_path=data, train_iters=9, max_nonfinite_steps=3, save=tmp_path)
    ended = run(2, **flags, save_interval=2, within=nan_from_step_3_on)
    message = the_error(ended[0].err)
    assert [one.status for one in ended] == [4, 4]
    told = (
        "3 steps in a row",
        "--max-nonfinite-steps 3",
        "step 5",
        "rank 1, microbatch 1 (samples ",
        "Parameters are those of step 2",
        f"{tmp_path}/iter_0000002 stands",
        "--skip-samples 16:40",
    )
    assert all(word in message for word in told), message
    assert "microbatch 0" not in message and checkpoints(tmp_path) == [2, 4]
    ended = run(2, **flags, load=tmp_path, within=nan_from_step_3_on)
    assert [one.status for one in ended] == [4, 4] and "step 5: rank 1" in the_error(ended[0].err)
    assert losses(tmp_path).keys() == {1, 2, 3, 4}  # the log ends with the last step that was carried out
    train(2, **flags, load=tmp_path)
    assert [entry["nonfinite"] for entry in entries(tmp_path)] == [False, False, True, True] + 5 * [False]
