"""Held-out windows: the last share of the training data, or sets of their own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_salt.config import DataConfig
from megatron_salt.data.blend import parse_data_path, parse_valid_data_path
from megatron_salt.data.samples import open_training_data
from megatron_salt.errors import UserError
from tests.data.batch.conftest import EOD, LENGTH, open_train, weighted


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
