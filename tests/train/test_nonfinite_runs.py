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

from megatron_salt.data.batch import Batches, Microbatch
from megatron_salt.errors import NonFiniteError
from megatron_salt.train import loop
from megatron_salt.train.nonfinite import no_way_out, refuse_nonfinite_losses
from megatron_salt.train.step import Student
from tests.support.program import GLOBAL_BATCH, checkpoints, run, the_error, train, write_tokens

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
    refuse_nonfinite_losses({"losses": [1.0, 2.0]}, 7, no_way_out)
    with pytest.raises(NonFiniteError, match="after step 7 the loss"):
        refuse_nonfinite_losses({"losses": [1.0, None]}, 7, no_way_out)
