"""What the stages of a run with a selection draw, sample by sample, against lists and sets."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Literal

import numpy as np
import pytest

from megatron_salt.config import DataConfig
from megatron_salt.data.batch import Batches
from megatron_salt.data.samples import Samples, open_training_data
from megatron_salt.errors import UserError
from megatron_salt.salt.stage_samples import StageSamples
from megatron_salt.selection.selection_file import Selection
from tests.support.datasets import WriteDataset
from tests.support.selections import write_ids

LENGTH, EOD = 8, 99
Stage2 = Literal["all", "unseen"]


@pytest.fixture
def data(write_dataset: WriteDataset) -> DataConfig:
    """30 and 13 windows."""
    random = np.random.default_rng(0)
    return DataConfig(data_path=tuple(
        write_dataset(name, [random.integers(0, 90, windows * LENGTH + 1).tolist()]) for name, windows in (("web", 30), ("code", 13))
    ))  # fmt: skip


def weighted(data: DataConfig) -> DataConfig:
    web, code = data.data_path
    return dataclasses.replace(data, data_path=("0.6", web, "0.4", code))


def prefixes(data: DataConfig) -> tuple[str, ...]:
    return data.data_path[1::2] if len(data.data_path) == 4 else data.data_path


def samples_of_stages(data: DataConfig, tmp_path, ids: list[int], stage2: Stage2 = "all") -> StageSamples:
    path = write_ids(tmp_path / "chosen", prefixes(data), LENGTH, ids)
    return StageSamples(open_training_data(data, LENGTH, 1234, 100, EOD)[0], Selection.open(path), stage2)


def drawn(samples: Samples, count: int) -> list[int]:
    return samples.ids(np.arange(count)).tolist()


CHOSEN = [0, 3, 4, 11, 12, 29, 30, 31, 35, 42]  # six of web's 30 windows, four of code's 13


@pytest.mark.parametrize("mix", [False, True])
def test_everything_selected_is_the_order_of_a_run_without_a_selection(data: DataConfig, tmp_path, mix: bool) -> None:
    data = weighted(data) if mix else data
    stages = samples_of_stages(data, tmp_path, list(range(43)))
    assert drawn(stages.stage1(), 300) == drawn(stages.everything, 300)


def test_stage_1_visits_the_selection_once_before_any_repeat(data: DataConfig, tmp_path) -> None:
    stage1 = samples_of_stages(data, tmp_path, CHOSEN).stage1()
    order = drawn(stage1, 30)
    assert [sorted(order[epoch : epoch + 10]) for epoch in (0, 10, 20)] == [CHOSEN] * 3
    assert order[:10] not in (order[10:20], CHOSEN)
    assert stage1.num_members == 10 and stage1.repeats(10) is None
    assert stage1.repeats(25) == "25 samples take 25 from the train data, which has 10: 15 are repeats, the last in epoch 3"


def test_with_weights_each_datasets_selection_is_a_pool_of_its_own(data: DataConfig, tmp_path) -> None:
    order = drawn(samples_of_stages(weighted(data), tmp_path, CHOSEN).stage1(), 1000)
    counts = Counter(order)
    assert set(counts) == set(CHOSEN)
    of_web = [number for number in order if number < 30]
    assert len(of_web) == pytest.approx(600, abs=1)
    assert sorted(of_web[:6]) == [number for number in CHOSEN if number < 30]


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("passed", [0, 1, 7, 10, 24, 200])
@pytest.mark.parametrize("chosen", [CHOSEN, [5, 40], list(range(1, 43))])
def test_unseen_is_every_sample_that_stage_1_did_not_visit(
    data: DataConfig, tmp_path, mix: bool, passed: int, chosen: list[int]
) -> None:
    if mix and len(chosen) == 42:
        chosen = chosen[:-1]  # of the smaller dataset too something is left
    data = weighted(data) if mix else data
    stages = samples_of_stages(data, tmp_path, chosen, "unseen")
    seen = set(drawn(stages.stage1(), passed))
    stage2 = stages.stage2(passed)
    assert stage2.num_members == 43 - len(seen)
    found = Counter(drawn(stage2, 43 - len(seen) if not mix else 5000))
    assert set(found) == set(range(43)) - seen
    if not mix:
        assert set(found.values()) == {1}
    assert stages.repeats(passed, 100) is None


@pytest.mark.parametrize("mix", [False, True])
def test_all_begins_an_order_of_its_own_and_counts_what_stage_1_saw(data: DataConfig, tmp_path, mix: bool) -> None:
    data = weighted(data) if mix else data
    stages = samples_of_stages(data, tmp_path, CHOSEN, "all")
    for passed, to_come in ((4, 20), (10, 43), (30, 17), (0, 43)):
        seen = set(drawn(stages.stage1(), passed))
        order = drawn(stages.stage2(passed), to_come)
        count = sum(number in seen for number in order)
        told = stages.repeats(passed, to_come)
        assert told == (f"{count} of the {to_come} samples of stage 2 were in stage 1 too (--stage2-data unseen avoids that)"
                        if count else None)  # fmt: skip
    assert drawn(stages.stage2(3), 43) == drawn(stages.stage2(9), 43) != drawn(stages.everything, 43)
    assert mix or sorted(drawn(stages.stage2(3), 43)) == list(range(43))


def test_batches_go_on_with_the_order_of_stage_2_from_its_beginning(data: DataConfig, tmp_path) -> None:
    """Whatever the replicas, and with samples that are jumped over before, at and after the change."""
    stages = samples_of_stages(data, tmp_path, CHOSEN, "unseen")
    skip = ((2, 4), (8, 9), (12, 15))
    first = Batches(stages.stage1(), global_batch_size=4, micro_batch_size=1, replica=0, num_replicas=1, skip=skip)
    assert first.position(8) == 10  # 8 and the two that were jumped over
    one = drawn(stages.stage1(), 100)
    assert [m.sample_ids[0] for step in (0, 4) for m in first.fetch(step)] == [one[i] for i in (0, 1, 4, 5, 6, 7, 8, 9)]
    stage2 = stages.stage2(first.position(8))
    assert stage2.num_members == 43 - 10  # what was jumped over is not to come back
    second = first.going_on_with(stage2, 8)
    two = drawn(stage2, 100)
    expected = [two[i] for i in (1, 2, 3, 4, 8, 9, 10, 11)]
    assert [m.sample_ids[0] for step in (8, 12) for m in second.fetch(step)] == expected
    halves = [
        Batches(stages.stage1(), global_batch_size=4, micro_batch_size=2, replica=replica, num_replicas=2, skip=skip)
        .in_microbatches_of(1)
        .going_on_with(stage2, 8)
        for replica in (0, 1)
    ]
    assert [m.sample_ids[0] for step in (8, 12) for half in halves for m in half.fetch(step)] == expected
    assert [second.position(count) for count in (8, 9, 12, 13)] == [0, 2, 5, 9]


@pytest.mark.parametrize("ids, stage2, changes, batch, told", [
    (CHOSEN, "all", {}, 11, "has 10 samples, fewer than one --global-batch-size 11"),
    (CHOSEN, "all", dict(valid_share=0.1), 4, "has 1 of the 3 windows of .*web that --valid-share holds out"),
    ([1, 2, 3, 4], "all", dict(mix=True), 4, "has no sample of .*code, to which --data-path gives a weight"),
    (list(range(43)), "unseen", {}, 4, "stage 1 visits all 43 samples of the data in --kd-steps, and nothing is left for stage 2"),
    ([0, *range(30, 43)], "unseen", dict(mix=True), 4, "stage 1 visits all 13 samples of .*code"),
])  # fmt: skip
def test_a_selection_that_cannot_feed_a_stage_is_refused(
    data: DataConfig, tmp_path, ids: list[int], stage2: Stage2, changes: dict, batch: int, told: str
) -> None:
    data = weighted(data) if changes.pop("mix", False) else data
    stages = samples_of_stages(dataclasses.replace(data, **changes), tmp_path, ids, stage2)
    with pytest.raises(UserError, match=f"^--(stage1-selection .*chosen|stage2-data unseen).*{told}"):
        stages.refuse_unfit(batch, passed=43, has_stage2=True)


def test_one_that_can_is_not(data: DataConfig, tmp_path) -> None:
    samples_of_stages(data, tmp_path, CHOSEN, "unseen").refuse_unfit(10, 1000, has_stage2=True)
    samples_of_stages(data, tmp_path, list(range(43)), "unseen").refuse_unfit(4, 42, has_stage2=True)
    samples_of_stages(data, tmp_path, list(range(43)), "unseen").refuse_unfit(4, 1000, has_stage2=False)
