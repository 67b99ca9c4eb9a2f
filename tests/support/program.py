"""The whole program in tests: a small dataset, the flags of a small run, and that run on ranks of the pool.

A run is given by its flags. `run` calls `pretrain.main` in every rank of the pool; `start` starts it as a process of its own, by
`python -m`. Results are read from what a run leaves on disk: its JSONL and its checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from megatron_salt import pretrain
from megatron_salt.preprocess.indexed_writer import IndexedWriter, token_dtype
from tests.support.ranks import run_ranks

if TYPE_CHECKING:
    import pytest  # not there where tests/gpu/first_run.py runs

SEQ_LENGTH = 16
GLOBAL_BATCH = 8
NUM_WINDOWS = 22  # so that with 8 samples a step the first epoch ends inside step 3
EOD, VOCABULARY = 256, 257  # of the byte-level tokenizer

SMALL: dict[str, Any] = dict(
    tokenizer_type="ByteLevelTokenizer", num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
    num_query_groups=2, swiglu=True, normalization="RMSNorm", position_embedding_type="rope", seq_length=SEQ_LENGTH,
    micro_batch_size=2, global_batch_size=GLOBAL_BATCH, lr=3e-3, lr_warmup_iters=1, clip_grad=0.5, loss_chunk_tokens=24,
)  # fmt: skip
DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.1)


def argv(**flags: Any) -> list[str]:
    """The command line of the small run with changes; None and False omit a flag."""
    words: list[str] = []
    for name, value in (SMALL | flags).items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return words


def write_tokens(prefix: Path, tokens: np.ndarray | None = None, windows: int = NUM_WINDOWS, seed: int = 0) -> str:
    """Write a byte-level dataset PREFIX.bin/.idx of two documents, by default of random words. Returns the prefix."""
    if tokens is None:
        random = np.random.default_rng(seed)
        words = [random.integers(97, 123, length) for length in (3, 5, 2, 7, 4, 6)]
        text = np.concatenate([np.append(words[word], 32) for word in random.integers(0, 6, windows * SEQ_LENGTH)])
        tokens = text[: windows * SEQ_LENGTH + 1]
        tokens[100::150] = EOD
    writer = IndexedWriter(str(prefix), token_dtype(VOCABULARY))
    half = len(tokens) // 2
    writer.append(tokens.astype(writer.dtype), np.array([half, len(tokens) - half], np.int32))
    writer.finish()
    return str(prefix)


# ---- running ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How the program ended on one rank."""

    status: int
    out: str
    err: str


def run(world_size: int = 1, *, within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        timeout: float = 120.0, **flags: Any) -> list[Ended]:  # fmt: skip
    """Run the program with these flags. Returns how each rank ended. within: a context manager entered around it in every rank."""
    return run_ranks(world_size, main, argv(**flags), within, timeout=timeout)


def train(world_size: int = 1, **flags: Any) -> Ended:
    """`run` for a run that must succeed. Returns how the last rank, which prints the log, ended."""
    ended = run(world_size, **flags)
    assert [one.status for one in ended] == [0] * world_size, ended
    return ended[-1]


def refused(world_size: int = 1, **flags: Any) -> str:
    """`run` for a run that every rank must refuse in one line without a traceback. Returns that line after "error: "."""
    ended = run(world_size, **flags)
    for one in ended:
        assert one.status == 2, one
        assert one.err.count("error: ") == 1 and "Traceback" not in one.err, one.err
    return the_error(ended[0].err)


def the_error(err: str) -> str:
    """The message of the last error on stderr."""
    *_, last = err.rstrip("\n").partition("error: ")
    return last


def main(words: list[str], within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext) -> Ended:
    """In every rank of a pool: run the program."""
    in_the_pool = mock.patch("megatron_salt.train.run.distributed", return_value=contextlib.nullcontext())
    out, err = io.StringIO(), io.StringIO()
    with in_the_pool, within(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = pretrain.main(words)
    return Ended(status, out.getvalue(), err.getvalue())


def begin(directory: Path, world_size: int = 1, **flags: Any) -> list[Process]:
    """Start the program in processes that can be killed. Their output goes to DIRECTORY/rank-R. The pool's fork server has already made
    the imports, so this is cheap."""
    run_ranks(1, os.getpid)  # there is a fork server now
    rendezvous = tempfile.mktemp(prefix="rendezvous-", dir=directory)
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=alone, args=(argv(**flags), rank, world_size, rendezvous, directory / f"rank-{rank}"))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def alone(words: list[str], rank: int, world_size: int, rendezvous: str, output: Path) -> None:
    """The program as one rank, its output in a file. In a process of its own, which leads a process group."""
    import torch
    import torch.distributed as dist

    @contextlib.contextmanager
    def distributed(
        timeout: timedelta, rendezvous_timeout: timedelta, leaving: Callable[[], str | None], device: str
    ) -> Iterator[None]:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timeout)
        yield
        dist.barrier()

    os.setpgrp()  # so that its writers die with it
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with mock.patch("megatron_salt.train.run.distributed", distributed):
        sys.exit(pretrain.main(words))


def start(world_size: int = 1, **flags: Any) -> subprocess.Popen[str]:
    """Start the program as a process of its own, with torchrun for several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)] if world_size > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "megatron_salt.pretrain", *argv(**flags)], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    """Wait until the condition holds or the process ends."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the process did not get there in time"
        time.sleep(0.002)


# ---- what it left -------------------------------------------------------------------------------------------------------


def entries(save: str | Path, kind: str = "step") -> list[dict[str, Any]]:
    """The entries of one kind in the JSONL."""
    lines = Path(save, "train.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def losses(save: str | Path) -> dict[int, float]:
    """{step: loss} from the JSONL, which must hold each step once."""
    steps = entries(save)
    curve = {entry["step"]: entry["loss"] for entry in steps}
    assert len(curve) == len(steps), "the JSONL repeats a step"
    return curve


def numbers(save: str | Path) -> list[tuple[Any, ...]]:
    """Samples, loss, gradient norm and learning rate of every step: equal runs have the same bits."""
    return [tuple(entry[key] for key in ("step", "consumed_samples", "loss", "grad_norm", "lr")) for entry in entries(save)]


def checkpoints(save: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a directory."""
    return sorted(int(path.name.removeprefix("iter_")) for path in Path(save).glob("iter_*") if path.name[5:].isdigit())


def state_of(save: str | Path, step: int) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads(Path(save, f"iter_{step:07d}", "state.json").read_bytes())


def tensors(save: str | Path, step: int) -> dict[str, str]:
    """Hashes of the files with weights, optimizer and random state. Under one layout, equal states make equal files."""
    files = json.loads(Path(save, f"iter_{step:07d}", "checksums.json").read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


def refused_at_once(capsys: pytest.CaptureFixture[str], save: Path, **flags: Any) -> str:
    """The error message of a run that is refused before ranks join, in this process. Nothing is written, not even --save."""
    assert pretrain.main(argv(save=save, **flags)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert not save.exists()
    return err
