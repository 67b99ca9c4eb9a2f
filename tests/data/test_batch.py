"""Batches depend only on the consumed count; masks are Megatron's; bad data is refused by name."""

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
from megatron_salt.data.blend import parse_data_path, parse_valid_data_path
from megatron_salt.data.masking import Masking
from megatron_salt.data.samples import Samples, open_training_data
from megatron_salt.data.skip_samples import parse_skip_samples
from megatron_salt.errors import UserError
from tests.support.datasets import WriteDataset, bytes_read, write_sparse

EOD = 0
LENGTH = 8


def documents(seed: int, num_documents: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, 100, rng.integers(0, 14)).tolist(), EOD] for _ in range(num_documents)]


def stream(of: list[list[int]]) -> list[int]:
    return [token for document in of for token in document]


@pytest.fixture
def data(write_dataset: WriteDataset) -> DataConfig:
    return DataConfig(data_path=(write_dataset("web", documents(1)), write_dataset("code", documents(2), np.int32)))


def open_train(data: DataConfig, seed: int = 1234) -> Samples:
    return open_training_data(data, LENGTH, seed, 100, EOD)[0]


def weighted(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, data_path=("0.7", data.data_path[0], "0.3", data.data_path[1]))


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


def slow_masks(tokens: list[int], masking: Masking) -> tuple[list[float], list[int], list[int]]:
    """Slow twin of Masking.of: one token at a time."""
    loss_mask, position_ids, document_of = [], [], []
    position = document = 0
    for index, token in enumerate(tokens):
        loss_mask.append(0.0 if masking.eod_mask_loss and token == EOD else 1.0)
        position_ids.append(position if masking.reset_position_ids else index)
        document_of.append(document)
        position += 1
        if token == EOD:
            position = 0
            document += 1
    return loss_mask, position_ids, document_of


FLAGS = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]


@pytest.mark.parametrize("flags", FLAGS)
def test_masks_equal_the_slow_twin(flags: tuple[bool, bool, bool]) -> None:
    masking = Masking(EOD, *flags)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (50, 13))
    tokens[0], tokens[1], tokens[2, 0], tokens[3, -1] = EOD, 1, EOD, EOD
    loss_mask, position_ids, document_of = masking.of(tokens)
    expected = [slow_masks(row.tolist(), masking) for row in tokens]
    assert loss_mask.dtype == np.float32 and position_ids.dtype == np.int64
    assert loss_mask.tolist() == [e[0] for e in expected]
    assert position_ids.tolist() == [e[1] for e in expected]
    if masking.reset_attention_mask:
        assert document_of is not None and document_of.dtype == np.int64
        assert document_of.tolist() == [e[2] for e in expected]
    else:
        assert document_of is None


@pytest.mark.parametrize("flags", FLAGS)
def test_masks_equal_megatron_cores(flags: tuple[bool, bool, bool]) -> None:
    import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    eod_mask_loss, reset_position_ids, reset_attention_mask = flags
    tokens = np.random.default_rng(1).integers(0, 4, (20, 13))
    loss_mask, position_ids, document_of = Masking(EOD, *flags).of(tokens)
    for row in range(20):
        hidden, their_loss_mask, their_position_ids = _get_ltor_masks_and_position_ids(
            torch.from_numpy(tokens[row]), EOD, reset_position_ids, reset_attention_mask, eod_mask_loss, True
        )
        assert loss_mask[row].tolist() == their_loss_mask.tolist()
        assert position_ids[row].tolist() == their_position_ids.tolist()
        visible = np.tril(np.ones((13, 13), bool))
        if document_of is not None:
            visible &= document_of[row][:, None] == document_of[row][None, :]
        assert np.array_equal(~visible, hidden[0].numpy())


def test_batches_carry_the_masks_of_their_own_samples(data: DataConfig) -> None:
    train = open_train(dataclasses.replace(data, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True))
    for m in Batches(train, global_batch_size=12, micro_batch_size=3, replica=0, num_replicas=1).fetch(24):
        loss_mask, position_ids, document_of = train.masking.of(m.tokens.numpy())
        assert m.documents is not None
        assert m.loss_mask.numpy().tolist() == loss_mask.tolist() and 0.0 in loss_mask
        assert m.position_ids.numpy().tolist() == position_ids.tolist()
        assert m.documents.numpy().tolist() == (document_of.tolist() if document_of is not None else None)
        assert all(tensor.is_contiguous() for tensor in (m.tokens, m.labels, m.loss_mask, m.position_ids, m.documents))


@pytest.mark.parametrize("flag, options", [
    ("--eod-mask-loss", DataConfig(eod_mask_loss=True)),
    ("--reset-position-ids", DataConfig(reset_position_ids=True)),
    ("--reset-attention-mask", DataConfig(reset_attention_mask=True)),
])  # fmt: skip
def test_masks_need_an_end_of_document_token(data: DataConfig, flag: str, options: DataConfig) -> None:
    options = dataclasses.replace(options, data_path=data.data_path)
    open_training_data(options, LENGTH, 1, 100, EOD)
    with pytest.raises(UserError, match=f"^{flag} needs an end-of-document token"):
        open_training_data(options, LENGTH, 1, 100, None)


@pytest.mark.parametrize("mix", [False, True])
def test_the_held_out_share_is_the_last_windows_of_each_dataset(data: DataConfig, mix: bool) -> None:
    data = weighted(data) if mix else data
    everything = open_train(data)
    train, sets = open_training_data(dataclasses.replace(data, valid_share=0.1), LENGTH, 1234, 100, EOD)
    (valid,) = sets.values()
    held_out: list[int] = []
    first = 0
    for windows in everything.windows:
        held_out += range(first + len(windows) - int(len(windows) * 0.1), first + len(windows))
        first += len(windows)
    assert len(valid) == len(held_out) and len(train) + len(valid) == len(everything)
    assert set(valid.ids(np.arange(20 * len(valid))).tolist()) == set(held_out)
    assert set(train.ids(np.arange(20 * len(train))).tolist()) == set(range(len(everything))) - set(held_out)
    some = np.array(held_out)
    assert valid.tokens(some).tolist() == everything.tokens(some).tolist()


def test_evaluations_see_the_same_windows_whatever_the_seed(data: DataConfig) -> None:
    shared = dataclasses.replace(data, valid_share=0.2)
    valid = [open_training_data(shared, LENGTH, seed, 100, EOD)[1]["valid"] for seed in (1, 2)]
    assert valid[0].ids(np.arange(50)).tolist() == valid[1].ids(np.arange(50)).tolist()
    assert set(valid[0].locate(valid[0].ids(np.arange(8)))[0].tolist()) == {0, 1}  # a short evaluation samples every dataset


def test_valid_data_path_opens_other_files(data: DataConfig) -> None:
    web, code = data.data_path
    train, sets = open_training_data(DataConfig(data_path=(web,), valid_data_path=("1", code)), LENGTH, 1, 100, EOD)
    assert [w.file.prefix for w in train.windows] == [web] and [w.file.prefix for w in sets["valid"].windows] == [code]
    assert open_training_data(data, LENGTH, 1, 100, EOD)[1] == {}


def test_named_sets_are_opened_in_their_order_and_each_may_be_a_blend(data: DataConfig) -> None:
    web, code = data.data_path
    words = (f"prose={web}", "mix=0.75", web, "0.25", code)
    _, sets = open_training_data(DataConfig(data_path=(web,), valid_data_path=words), LENGTH, 1, 100, EOD)
    assert list(sets) == ["valid/prose", "valid/mix"] and not sets["valid/prose"].weighted
    assert [w.file.prefix for w in sets["valid/mix"].windows] == [web, code]
    assert [pool.drawn for pool in sets["valid/mix"].progress(8)] == [6, 2]


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("prose=a", "prose=b"), "names the set prose twice"),
        (("a", "code=b"), "a stands before the first named set, code=b; name every set .*as ./code=b"),
        (("prose=", "code=b"), "prose= names no data"),
        (("prose=0.5", "a", "b"), "a weight before each prefix, got 0.5 a b"),
    ],
)
def test_names_of_sets_that_make_no_sense_are_refused(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=f"--valid-data-path .*{complaint}"):
        for found in parse_valid_data_path(words).values():
            parse_data_path(found, "--valid-data-path")


def test_a_path_with_an_equals_sign_is_no_name() -> None:
    assert parse_valid_data_path(("0.5", "./lang=en/a", "0.5", "/data/x=y/b")) == {
        "valid": ("0.5", "./lang=en/a", "0.5", "/data/x=y/b")
    }
    assert parse_valid_data_path(("en=/data/x=y/b",)) == {"valid/en": ("/data/x=y/b",)}


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
