"""Two small datasets, and the samples that a run draws from them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_salt.config import DataConfig
from megatron_salt.data.samples import Samples, open_training_data
from tests.support.datasets import WriteDataset

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
