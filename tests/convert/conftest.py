"""Fixtures: models of transformers, and what the tool makes of them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from megatron_salt.tools import convert_checkpoint
from tests.support.program import Ended
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def run_module(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a module of the checkout as a program."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    """Run tools/convert_checkpoint.py."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/convert_checkpoint.py", *map(str, words)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def _conversion(words: list[str]) -> Ended:
    """Run the tool. Called in the rank."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch("megatron_salt.convert.import_checkpoint.distributed", return_value=contextlib.nullcontext())
        )
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        status = convert_checkpoint.main(words)
    return Ended(status, out.getvalue(), err.getvalue())


def convert_in_rank(*words: object) -> Ended:
    """Run the tool in a rank of the pool, which has made its imports. transformers may not run there: give --no-verify."""
    (ended,) = run_ranks(1, _conversion, list(map(str, words)), timeout=120)
    return ended


def refusal(*words: object) -> str:
    """The one line of a conversion that is refused."""
    ended = convert_in_rank(*words)
    assert ended.status == 2 and "Traceback" not in ended.err, ended
    return one_error(ended.err)


def one_error(err: str) -> str:
    """The only line of stderr that begins with "error: "."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers for each of `foreign_models.MODELS`."""
    directory = tmp_path_factory.mktemp("foreign")
    made = run_module("tests.convert.foreign_models", directory)
    assert made.returncode == 0, made.stderr
    return directory


@pytest.fixture(scope="session")
def imported(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Import a model, once; returns its directory of checkpoints. transformers has computed the same logits and losses."""
    directory = tmp_path_factory.mktemp("imported")

    def make(name: str) -> Path:
        out = directory / name
        if not out.exists():
            ended = convert("import", foreign / name, "--to", out)
            assert ended.returncode == 0, ended.stderr
            assert "computed by transformers and this program" in ended.stdout, ended.stdout
        return out

    return make
