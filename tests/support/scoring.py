"""Run score_data in the ranks of the pool, and read the index that it wrote."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from megatron_salt.cli import run_tool
from megatron_salt.selection.score_format import columns
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.tools.score_data import ScoreConfig, score_data
from tests.support.program import the_error
from tests.support.ranks import run_ranks

TOP_K = (1, 10, 100)
NUM_SAMPLES = 22 + 9  # of both datasets


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def argv(**flags: Any) -> list[str]:
    words: list[str] = []
    for name, value in (dict(micro_batch_size=2, block_samples=4, score_top_k=TOP_K) | flags).items():
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-")]
            words += [] if value is True else [str(one) for one in (value if isinstance(value, tuple) else (value,))]
    return words


def main(words: list[str]) -> Ended:
    """In every rank of the pool: run the tool."""
    out, err = io.StringIO(), io.StringIO()
    in_the_pool = mock.patch("megatron_salt.parallel.launch.distributed", return_value=contextlib.nullcontext())
    with in_the_pool, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_tool(ScoreConfig, score_data, words)
    return Ended(status, out.getvalue(), err.getvalue())


def score(world_size: int = 1, **flags: Any) -> str:
    """Run the tool on `world_size` ranks without errors. Returns their stdout."""
    ended = run_ranks(world_size, main, argv(**flags))
    assert [one.status for one in ended] == [0] * world_size, ended
    return "".join(one.out for one in ended)


def refused(world_size: int = 1, **flags: Any) -> str:
    ended = run_ranks(world_size, main, argv(**flags))
    assert [one.status for one in ended] == [2] * world_size and not any("Traceback" in one.err for one in ended), ended
    return the_error(ended[0].err)


def table(directory: Path) -> dict[str, np.ndarray]:
    """All columns of an index."""
    opened = ScoreIndex.open([str(directory)])
    names = columns(opened.manifest.top_k, opened.manifest.seq_length)
    return {name: np.concatenate([part for _, part in opened.chunks(name)]) for name in names}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return list(one) == list(other) and all(one[name].tobytes() == other[name].tobytes() for name in one)
