"""Run a function on ranks with a device each: `on_devices(2, function, *arguments)` gives one result a rank.

A GPU and NCCL for each rank where there are GPUs; else the CPU and gloo, so that whatever runs here runs there too. Every rank is a
process of its own, started as a training run is, by torchrun. The pool of `tests/ranks.py` never sees a GPU, and is the other side
of comparisons.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def on_devices(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600.0) -> list[Any]:
    """Call `function(*arguments)`, of the top level of a module, in `world_size` processes inside of `distributed`; the results, by rank.
    Raises AssertionError as `program`. timeout: seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        program("tests.gpu.ranks", [name], world_size, timeout)
        return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(world_size)]


def program(module: str, words: list[str], world_size: int = 1, timeout: float = 600.0) -> None:
    """Run a program of the repository, such as `megatron_salt.pretrain`, by torchrun with a device a rank; an AssertionError with what it
    printed where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), "-m", module, *words]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # fmt: skip
    assert ended.returncode == 0, f"{module} {' '.join(words)} ended with {ended.returncode}:\n{ended.stdout}"


def be_a_rank(folder: Path) -> None:
    """In each process: join, call, leave the result."""
    import torch

    from megatron_salt.parallel.launch import distributed

    torch.backends.cuda.matmul.allow_tf32 = False
    function, arguments = pickle.loads((folder / "call").read_bytes())
    with distributed(timedelta(minutes=5)):
        result = function(*arguments)
    (folder / f"rank-{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
