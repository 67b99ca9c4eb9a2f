"""What a run takes over from a checkpoint's state, without ranks."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_salt.checkpoint import compatibility
from megatron_salt.checkpoint.run_state import OpenedCheckpoint
from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.config import ModelConfig, OptimizerConfig
from megatron_salt.errors import UserError
from megatron_salt.train.build_model import build_scheduler

BATCH = 10
MODEL_FIELDS = {field.name for field in fields(ModelConfig)}
SAVED = read_state(Path(__file__).parent / "old" / "iter_0000004")
FLAGS = OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style="linear", lr_warmup_iters=2)


def schedule(flags: OptimizerConfig, iters: int) -> tuple[OptimizerParamScheduler, Any]:
    """The schedule of a run of `iters` steps, and a stand-in for the optimizer that it drives."""
    optimizer = SimpleNamespace(param_groups=[{"max_lr": flags.lr, "min_lr": flags.min_lr, "lr": 0.0, "weight_decay": 0.0}])
    return build_scheduler(optimizer, flags, iters * BATCH, BATCH), optimizer  # type: ignore[arg-type]


def checkpoint_after(flags: OptimizerConfig, iters: int, steps: int) -> OpenedCheckpoint:
    """The checkpoint of a run after some steps."""
    scheduler, _ = schedule(flags, iters)
    for _ in range(steps):
        scheduler.step(increment=BATCH)
    return OpenedCheckpoint(Path("checkpoint"), replace(SAVED, scheduler=scheduler.state_dict()), {})


def learning_rate(flags: OptimizerConfig, iters: int, steps: int) -> float:
    """Learning rate of the step after `steps` in an uninterrupted run."""
    scheduler, optimizer = schedule(flags, iters)
    for _ in range(steps):
        scheduler.step(increment=BATCH)
    return optimizer.param_groups[0]["lr"]


def resumed(flags: OptimizerConfig, iters: int, opened: OpenedCheckpoint) -> float:
    """Learning rate with which a run resumes, after its optimizer has loaded the checkpoint's groups."""
    scheduler, optimizer = schedule(flags, iters)
    optimizer.param_groups[0].update(max_lr=FLAGS.lr, min_lr=FLAGS.min_lr)
    compatibility.load_schedule(scheduler, optimizer, opened, compatibility.schedule_follows_run(flags))
    return optimizer.param_groups[0]["lr"]


def test_a_run_goes_on_where_its_checkpoint_is_and_with_new_data_at_their_beginning() -> None:
    run = compatibility.RunIdentity(
        yaml="", architecture={}, tokenizer_fingerprint=SAVED.tokenizer, data_fingerprint=SAVED.data_fingerprint, seed=1
    )
    opened = OpenedCheckpoint(Path("checkpoint"), SAVED, {})
    assert compatibility.state_from(opened, run, new_data=False) == SAVED.run
    state = compatibility.state_from(opened, replace(run, data_fingerprint="data:bbbb"), new_data=True)
    assert (SAVED.run.position, SAVED.run.stage2_since) == (32, 24) and SAVED.run.consumed_samples == 32
    assert state == replace(SAVED.run, position=0, stage2_since=None, events=(*SAVED.run.events, state.events[-1]))
    assert state.events[-1] == {"event": "new_data", "step": 4, "from": SAVED.data_fingerprint, "to": "data:bbbb"}


def test_a_checkpoint_that_lacks_a_field_of_the_architecture_has_its_default() -> None:
    """A release that did not know the field wrote it."""
    written = SAVED.architecture
    assert "parallel_residual" not in written and "rope_scaling" not in written
    run = compatibility.RunIdentity(
        yaml="",
        architecture=asdict(ModelConfig(**{name: value for name, value in written.items() if name in MODEL_FIELDS}))
        | {name: value for name, value in written.items() if name not in MODEL_FIELDS},
        tokenizer_fingerprint=SAVED.tokenizer,
        data_fingerprint=SAVED.data_fingerprint,
        seed=1,
    )
    opened = OpenedCheckpoint(Path("checkpoint"), SAVED, {})
    compatibility.refuse_other_run(opened, run, finetune=False, new_data=False)
    other = replace(run, architecture=run.architecture | {"parallel_residual": True})
    with pytest.raises(UserError, match="--parallel-residual is False there and True here"):
        compatibility.refuse_other_run(opened, other, finetune=False, new_data=False)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
def test_the_learning_rate_goes_on_where_it_was(steps: int) -> None:
    assert resumed(FLAGS, 20, checkpoint_after(FLAGS, 20, steps)) == learning_rate(FLAGS, 20, steps)


def test_a_longer_run_is_always_allowed_and_its_decay_with_it() -> None:
    assert resumed(FLAGS, 40, checkpoint_after(FLAGS, 20, 5)) == learning_rate(FLAGS, 40, 5)
    fixed = replace(FLAGS, lr_decay_iters=20)
    assert resumed(fixed, 40, checkpoint_after(fixed, 20, 5)) == learning_rate(fixed, 20, 5)
    share = replace(FLAGS, lr_warmup_iters=0, lr_warmup_fraction=0.5)
    assert resumed(share, 40, checkpoint_after(share, 20, 5)) == learning_rate(share, 40, 5)


@pytest.mark.parametrize(
    "change, sides",
    [
        ({"lr": 2.0}, "max_lr is 1.0 there and 2.0 here"),
        ({"lr_decay_style": "cosine"}, "lr_decay_style is linear there and cosine here"),
        ({"lr_decay_iters": 30}, "lr_decay_steps is 200 there and 300 here"),
        ({"weight_decay": 0.5}, "start_wd is 0.01 there and 0.5 here"),
    ],
)
def test_another_schedule_is_refused_or_chosen_by_flag(change: dict, sides: str) -> None:
    other, opened = replace(FLAGS, **change), checkpoint_after(FLAGS, 20, 5)
    with pytest.raises(UserError, match=f"{sides}.*--override-opt-param-scheduler.*--use-checkpoint-opt-param-scheduler"):
        resumed(other, 20, opened)
    assert resumed(replace(other, override_opt_param_scheduler=True), 20, opened) == learning_rate(other, 20, 5)
    assert resumed(replace(other, use_checkpoint_opt_param_scheduler=True), 20, opened) == learning_rate(FLAGS, 20, 5)
