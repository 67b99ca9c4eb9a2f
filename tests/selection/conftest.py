from __future__ import annotations

import os

import pytest

from tests.support.selections import MANIFEST, ROWS, files_in, write_shard


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync does nothing: what it is for is tested by the order of calls, and waiting for the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an index that one job wrote without an interruption."""
    directory = tmp_path_factory.mktemp("unsharded")
    write_shard(directory, MANIFEST, ROWS, (0, 1))
    return files_in(directory)
