"""Run a function on ranks that are processes of their own: `on_devices(2, function, *arguments)` gives one result a rank.

A GPU and NCCL for each rank where there are GPUs; else the CPU and gloo, so that whatever runs here runs there too. `on_cpu` is the
other side of a comparison: the CPU and gloo wherever it runs, and without Transformer Engine, whose optimizer needs a GPU. (The pool of
`tests/support/ranks.py` has no such trouble where it is not installed.) Ranks are started as those of a training run are, by torchrun.
"""

from __future__ import annotations

import importlib.metadata
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
ENGINE = ("transformer_engine", "transformer-engine")


def on_devices(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)`, of the top level of a module, in `world_size` processes inside of `distributed`; the results, by rank.
    Raises AssertionError as `program`."""
    return _on_ranks(world_size, function, arguments, {})


def on_cpu(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The same without GPUs and without Transformer Engine."""
    return _on_ranks(world_size, function, arguments, {"CUDA_VISIBLE_DEVICES": "", "WITHOUT_ENGINE": "1"})


def _on_ranks(
    world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]
) -> list[Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        program("tests.gpu.ranks", [name], world_size, environment)
        return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(world_size)]


def program(
    module: str, words: list[str], world_size: int = 1, environment: dict[str, str] | None = None, timeout: float = 600.0
) -> None:
    """Run a program of the repository, such as `megatron_salt.pretrain`, by torchrun with a device a rank; an AssertionError with what it
    printed where it fails. timeout: seconds."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world_size),
        "-m",
        module,
        *words,
    ]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}), timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, f"{module} {' '.join(words)} ended with {ended.returncode}:\n{ended.stdout}"


def be_a_rank(folder: Path) -> None:
    """In each process: join, call, leave the result."""
    if "WITHOUT_ENGINE" in os.environ:
        hide_engine()
    import torch

    from megatron_salt.parallel.launch import distributed

    torch.backends.cuda.matmul.allow_tf32 = False
    function, arguments = pickle.loads((folder / "call").read_bytes())
    with distributed(timedelta(minutes=5)):
        result = function(*arguments)
    (folder / f"rank-{os.environ['RANK']}").write_bytes(pickle.dumps(result))


def hide_engine() -> None:
    """Let nothing in this process find Transformer Engine. Before megatron-core is imported."""
    version = importlib.metadata.version

    def version_of_others(name: str) -> str:
        if name in ENGINE:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    importlib.metadata.version = version_of_others
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
