"""A run that resumes reports each flag that changed since its checkpoint."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_salt import yaml_core
from megatron_salt.checkpoint.changes import (
    NOT_REPORTED,
    NOT_REPORTED_SECTIONS,
    Change,
    changes,
    changes_since,
    reported_leaves,
    tell,
)
from megatron_salt.config import DataConfig, OptimizerConfig, RunConfig
from megatron_salt.config.run import sections
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.salt.schedule import Schedule
from tests.support.program import entries, run, state_of, train, write_tokens

HERE = RunConfig(optimizer=OptimizerConfig(adam_beta2=0.9, clip_grad=0.5, lr=1e-3), data=DataConfig(eod_mask_loss=True))
THERE = RunConfig(optimizer=OptimizerConfig(adam_beta2=0.95))


def tree(config: RunConfig) -> dict:
    return yaml_core.load(to_yaml(config))


def test_each_changed_flag_is_told_and_no_other() -> None:
    assert changes(tree(THERE), tree(THERE)) == []
    found = changes(tree(THERE), tree(HERE))
    assert found == [Change("lr", 3e-4, 1e-3), Change("adam_beta2", 0.95, 0.9), Change("clip_grad", 1.0, 0.5),
                     Change("eod_mask_loss", False, True)]  # fmt: skip
    assert tell(found[1].event(4)) == "changed since the checkpoint of step 4: --adam-beta2 0.95 -> 0.9"
    assert tell(found[3].event(4)).endswith(": --eod-mask-loss false -> true")


def test_a_schedule_that_is_the_checkpoints_has_not_changed() -> None:
    here = replace(HERE, optimizer=replace(HERE.optimizer, use_checkpoint_opt_param_scheduler=True))
    assert [change.name for change in changes(tree(THERE), tree(here))] == ["adam_beta2", "clip_grad", "eod_mask_loss"]


def test_a_flag_that_the_checkpoint_does_not_know_had_its_default(tmp_path: Path) -> None:
    for text in ("", "seed: 1", "optimizer: 3", "[1, 2]", "optimizer: {adam_beta2: 0.95}", "{"):
        (tmp_path / "run.yaml").write_text(text)
        assert changes_since(tmp_path, "") == ([Change("adam_beta2", 0.95, 0.999)] if "0.95" in text else [])


def test_every_name_that_is_not_told_is_a_flag_and_schedules_are_told_elsewhere() -> None:
    known = {section: {leaf.name for leaf in fields(members)} for section, members in sections().items()}
    assert known.keys() >= NOT_REPORTED_SECTIONS and all(names <= known[section] for section, names in NOT_REPORTED.items())
    assert {leaf.name for leaf in fields(Schedule)} <= NOT_REPORTED["salt"]
    told = {name for _, name, _ in reported_leaves()}
    assert not told & {
        "outcome_file",
        "exit_interval",
        "allow_valid_in_train",
        "distributed_timeout_minutes",
        "profile_ranks",
        "data_path",
    }
    assert {"lr", "weight_decay", "adam_beta2", "clip_grad", "eod_mask_loss", "global_batch_size", "bf16", "fp8_format"} <= told


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_tells_them_once_and_remembers_them(tmp_path: Path, world_size: int) -> None:
    flags = dict(data_path=write_tokens(tmp_path / "words"), save=tmp_path / "run", load=tmp_path / "run", adam_beta2=0.9)
    train(world_size, train_iters=4, exit_interval=2, **flags | dict(adam_beta2=0.95))
    rehearsed = run(train_iters=4, exit_interval=3, log_interval=2, dry_run=world_size, **flags)[0]
    ended = train(world_size, train_iters=4, exit_interval=3, log_interval=2, **flags)
    line = "changed since the checkpoint of step 2: --adam-beta2 0.95 -> 0.9"
    for out in (ended.out, rehearsed.out):
        assert out.count("changed since") == out.count(line) == 1
    assert "changed since" not in train(world_size, train_iters=4, **flags).out
    [told] = [entry for entry in entries(tmp_path / "run", "event") if "flag" in entry]
    assert (told["step"], told["flag"], told["from"], told["to"]) == (2, "--adam-beta2", 0.95, 0.9)
    assert [event["step"] for event in state_of(tmp_path / "run", 4)["events"] if event["event"] == "changed"] == [2]
