"""Batches depend only on the consumed count; bad data is refused by name."""

from __future__ import annotations

import dataclasses
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_salt.config import DataConfig
from megatron_salt.data.batch import Batches, stream_positions
from megatron_salt.data.samples import open_training_data
from megatron_salt.data.skip_samples import parse_skip_samples
from megatron_salt.errors import UserError
from tests.data.batch.conftest import EOD, LENGTH, documents, open_train, stream, weighted
from tests.support.datasets import WriteDataset, bytes_read, write_sparse


def test_a_global_id_is_a_window_of_the_files_end_to_end(data: DataConfig) -> None:
    """Oracle: slices of the two token lists."""
    train = open_train(data)
    web, code = stream(documents(1)), stream(documents(2))
    expected = [
        tokens[i * LENGTH : i * LENGTH + LENGTH + 1] for tokens in (web, code) for i in range((len(tokens) - 1) // LENGTH)
    ]
    assert len(train) == len(expected)
    assert train.tokens(np.arange(len(train))).tolist() == expected
    ids, tokens = train.read(np.arange(len(train)))
    assert sorted(ids.tolist()) == list(range(len(train)))
    assert tokens.tolist() == [expected[i] for i in ids]


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("micro, replicas", [(1, 1), (3, 1), (12, 1), (1, 2), (2, 3), (4, 3), (1, 12)])
def test_a_step_has_the_same_samples_in_the_same_order_for_any_dp_and_micro_batch(
    data: DataConfig, micro: int, replicas: int, mix: bool
) -> None:
    """Oracle: the order itself. 40 steps of 12 samples are several epochs; each epoch has every sample once."""
    train = open_train(weighted(data) if mix else data)
    batches = [
        Batches(train, global_batch_size=12, micro_batch_size=micro, replica=replica, num_replicas=replicas)
        for replica in range(replicas)
    ]
    order = train.ids(np.arange(480))
    for step in range(40):
        microbatches = [m for replica in batches for m in replica.fetch(12 * step)]
        assert all(
            m.tokens.shape == m.labels.shape == m.loss_mask.shape == m.position_ids.shape == (micro, LENGTH)
            for m in microbatches
        )
        ids = np.concatenate([m.sample_ids for m in microbatches])
        assert ids.tolist() == order[12 * step : 12 * (step + 1)].tolist()
        tokens = train.tokens(ids)
        assert torch.equal(torch.cat([m.tokens for m in microbatches]), torch.from_numpy(tokens[:, :-1]))
        assert torch.equal(torch.cat([m.labels for m in microbatches]), torch.from_numpy(tokens[:, 1:]))
    if not mix:
        for first in range(0, 480 - len(train), len(train)):
            assert sorted(order[first : first + len(train)].tolist()) == list(range(len(train)))


def test_the_batch_size_may_change_between_steps_without_losing_or_repeating_a_sample(data: DataConfig) -> None:
    train = open_train(data)
    seen, consumed = [], 0
    for batch in (4, 4, 6, 2, 10):
        seen += [
            i
            for m in Batches(train, global_batch_size=batch, micro_batch_size=2, replica=0, num_replicas=1).fetch(consumed)
            for i in m.sample_ids.tolist()
        ]
        consumed += batch
    assert seen == train.ids(np.arange(consumed)).tolist()


def test_more_samples_than_there_are_wrap_and_are_told_with_numbers(data: DataConfig) -> None:
    train = open_train(data)
    size = len(train)
    assert train.repeats(size) is None
    assert train.repeats(2 * size + 5) == (
        f"{2 * size + 5} samples take {2 * size + 5} from the train data, which has {size}: "
        f"{size + 5} are repeats, the last in epoch 3"
    )
    assert sorted(train.ids(np.arange(size, 2 * size)).tolist()) == list(range(size))
    mixture = open_train(weighted(data))
    small = len(mixture.windows[0])
    message = mixture.repeats(2 * small)
    assert message is not None and f"web, which has {small}: " in message and "code" not in message


@pytest.mark.parametrize("skip, expected", [
    ((), [0, 1, 2, 3, 4, 5, 6, 7]),
    (("2:5",), [0, 1, 5, 6, 7, 8, 9, 10]),
    (("0:3",), [3, 4, 5, 6, 7, 8, 9, 10]),
    (("4:6", "1:2"), [0, 2, 3, 4, 7, 8, 9, 10]),
    (("1:4", "2:3"), [0, 4, 6, 7, 8, 9, 10, 11]),                             # a second spike right behind the first
])  # fmt: skip
def test_skipping_jumps_from_where_the_count_has_got_to(skip: tuple[str, ...], expected: list[int]) -> None:
    assert stream_positions(np.arange(8), parse_skip_samples(skip)).tolist() == expected


def test_skipping_leaves_what_came_before_and_never_shows_what_it_jumped_over(data: DataConfig) -> None:
    train = open_train(data)
    plain = [
        Batches(train, global_batch_size=4, micro_batch_size=2, replica=0, num_replicas=1).fetch(c) for c in range(0, 24, 4)
    ]
    skipping = [
        Batches(
            train, global_batch_size=4, micro_batch_size=2, replica=0, num_replicas=1, skip=parse_skip_samples(("8:16",))
        ).fetch(c)
        for c in range(0, 16, 4)
    ]
    ids = [[i for m in step for i in m.sample_ids.tolist()] for step in (plain[0], plain[1], plain[4], plain[5])]
    assert [[i for m in step for i in m.sample_ids.tolist()] for step in skipping] == ids


@pytest.mark.parametrize("value", ["5", "5:", ":5", "7:5", "5:5", "-1:5", "a:b", "1:2:3", "1.5:3", ""])
def test_skip_samples_that_are_no_range_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=f"--skip-samples takes A:B .* got {value}$"):
        parse_skip_samples((value,))


def test_two_skips_from_one_sample_are_refused() -> None:
    with pytest.raises(UserError, match="--skip-samples 5:9 and 5:12 start at the same sample"):
        parse_skip_samples(("5:12", "5:9"))


def test_ids_beyond_the_vocabulary_are_refused_by_file_and_window(write_dataset: WriteDataset) -> None:
    prefix = write_dataset("web", [list(range(40))])
    train, _ = open_training_data(DataConfig(data_path=(prefix,)), LENGTH, 1, 40, None)
    train.tokens(np.arange(4))
    train, _ = open_training_data(DataConfig(data_path=(prefix,)), LENGTH, 1, 30, None)
    train.tokens(np.arange(3))
    with pytest.raises(
        UserError, match="--data-path .*web: token id 30 at window 3, token 6 of it, is not in the vocabulary of 30"
    ):
        train.tokens(np.arange(4))
    negative, _ = open_training_data(
        DataConfig(data_path=(write_dataset("bad", [[1, -7] * 10], np.int32),)), LENGTH, 1, 40, None
    )
    with pytest.raises(UserError, match="token id -7"):
        negative.tokens(np.arange(1))


def test_data_that_cannot_be_used_is_refused_by_flag_and_numbers(write_dataset: WriteDataset, data: DataConfig) -> None:
    short = write_dataset("short", [[1] * LENGTH])
    for bad, message in [
        (DataConfig(), "--data-path is missing"),
        (
            dataclasses.replace(data, data_path=(*data.data_path, short)),
            f"--data-path .*short: {LENGTH} tokens .* --seq-length {LENGTH}",
        ),
        (
            dataclasses.replace(data, valid_data_path=(short,)),
            f"--valid-data-path .*short: {LENGTH} tokens .* --seq-length {LENGTH}",
        ),
        (dataclasses.replace(data, data_path=("nowhere",)), "--data-path nowhere: nowhere.idx does not exist"),
        (
            DataConfig(data_path=(write_dataset("one", [[1] * (LENGTH + 1)]),), valid_share=0.1),
            "--valid-share 0.1: .*one has 1 window",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            open_training_data(bad, LENGTH, 1, 100, EOD)


def test_the_fingerprint_names_content_cut_weights_and_split_and_not_the_path(data: DataConfig, tmp_path: Path) -> None:
    web, code = data.data_path
    for suffix in (".bin", ".idx"):
        shutil.copy(web + suffix, tmp_path / f"moved{suffix}")

    def fingerprint(*data_path: str, length: int = LENGTH, seed: int = 1, valid_share: float = 0.0) -> str:
        return open_training_data(DataConfig(data_path=data_path, valid_share=valid_share), length, seed, 100, EOD)[
            0
        ].fingerprint

    base = fingerprint(web)
    assert fingerprint("7", web, "3", code) == fingerprint("0.7", web, "0.3", code)
    assert base == fingerprint(str(tmp_path / "moved")) == fingerprint(web, seed=2)
    others = [
        fingerprint(code),
        fingerprint(web, code),
        fingerprint(code, web),
        fingerprint(web, length=4),
        fingerprint("0.5", web, "0.5", code),
        fingerprint("0.4", web, "0.6", code),
        fingerprint(web, valid_share=0.1),
    ]
    assert len({base, *others}) == 1 + len(others)
    assert f"--seq-length {LENGTH} from 1 dataset" in base


def test_a_billion_samples_open_and_the_last_is_found_without_an_index(tmp_path: Path) -> None:
    """Oracle: bytes read, memory allocated, and the known tokens at the end of the last window."""
    num_windows, length = 10**9, 16
    prefix = write_sparse(tmp_path / "huge", num_windows * length + 1, 10**6, tail=list(range(1, length + 2)))
    before = bytes_read()
    tracemalloc.start()
    train, sets = open_training_data(DataConfig(data_path=(prefix,), valid_share=0.001), length, 1, 100, EOD)
    valid = sets["valid"]
    last = train.tokens(np.array([num_windows - 1]))
    Batches(train, global_batch_size=8, micro_batch_size=8, replica=0, num_replicas=1).fetch(len(train) - 8)
    assert train.fingerprint
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(train), len(valid)) == (num_windows - 10**6, 10**6)
    assert last.tolist() == [list(range(1, length + 2))]
    assert peak < 1 << 20
    assert bytes_read() - before < 1 << 20
