"""The first run on a GPU: whether everything works there, and how fast it is, in at most 8 minutes.

    python tests/gpu/first_run.py OUT                       on one GPU; make gpu-first-run
    python tests/gpu/first_run.py OUT --tiny --device cpu   the same stages with small shapes, to see that they run
    python tests/gpu/first_run.py --record                  the expected numbers anew, on the CPU, into tests/gpu/expected/

It needs PyTorch 2.10 or later and no network. What else it imports can lie in a folder of wheels (tests/gpu/collect_wheels.sh). It runs in
one process, and compares with numbers that a CPU computed before. OUT gets results.jsonl, a line for each stage as soon as that has ended,
and table.md. The exit status is 0 where no stage failed. Stages are in the order of their worth; one that no longer fits is left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tests.gpu.stages.runner import Stage

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 480.0
NEEDED = (
    "torch", "megatron", "numpy", "yaml", "psutil", "tyro", "docstring_parser", "typeguard", "msgspec", "zstandard", "tokenizers", "tqdm",
)  # fmt: skip


def main(stages: str = "tests.gpu.stages.first") -> int:
    """Run what the command line asks for. stages: a module with STAGES. Returns the exit status."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("out", nargs="?", type=Path, help="a new folder for the results")
    asked.add_argument(
        "--device", choices=("cuda", "cpu", "virtual"), default="cuda",
        help="virtual: the GPU's branches of the program on a CPU, see tests/support/virtual_cuda; with --tiny",
    )  # fmt: skip
    asked.add_argument("--tiny", action="store_true", help="small shapes")
    asked.add_argument("--seconds", type=float, help=f"time for all stages; default: {SECONDS:.0f} on a GPU, an hour on a CPU")
    asked.add_argument("--stages", nargs="+", default=[], metavar="NAME", help="only these")
    asked.add_argument("--list", action="store_true", help="print the stages and their limits")
    asked.add_argument("--record", action="store_true", help="compute the expected numbers on the CPU")
    asked.add_argument("--after", help=argparse.SUPPRESS)  # a process that goes on after this stage
    asked.add_argument("--until", type=float, help=argparse.SUPPRESS)  # time.time()
    flags = asked.parse_args()
    if flags.record or flags.device != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    sys.path.insert(0, str(ROOT))
    quieten()
    if flags.record:
        return record()
    if (problem := whats_missing(flags)) is not None:
        return refuse(problem)
    if flags.device == "virtual":
        return virtually(flags, stages)
    return carry_out(flags, importlib.import_module(stages).STAGES)


def virtually(flags: argparse.Namespace, stages: str) -> int:
    """Run under virtual CUDA. A fault that a GPU would not forgive is a failure."""
    from tests.support.virtual_cuda import install

    recorder = install()
    from tests.support.virtual_cuda.steps import shorten_measurements

    shorten_measurements()
    status = carry_out(flags, importlib.import_module(stages).STAGES)
    report = recorder.take()
    print(report.text(), file=sys.stderr)
    return status or int(bool(report.faults))


def quieten() -> None:
    """Hide what libraries say at import: that there is no Transformer Engine and no apex."""
    for module in ("megatron", r"torch\.distributed", "contextlib"):
        warnings.filterwarnings("ignore", module=module)


def whats_missing(flags: argparse.Namespace) -> str | None:
    """Why nothing can run, in one line: no results folder, an old one, no package, no GPU."""
    if flags.out is None and not flags.list:
        return "name a new folder for the results"
    if flags.out is not None and flags.after is None and (flags.out / "results.jsonl").exists():
        return f"{flags.out / 'results.jsonl'} exists: name a new folder"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"not installed: {', '.join(missing)}; tests/gpu/collect_wheels.sh collects wheels for a machine without a network"
        )
    import torch

    if flags.device == "cuda" and not flags.list and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no NVIDIA GPU; `--tiny --device cpu` tries the stages without one"
    return None


def record() -> int:
    """Compute the expected numbers anew."""
    from tests.gpu.stages import seeded, small_model

    with tempfile.TemporaryDirectory() as name:
        small_model.write_expected(seeded.EXPECTED, small_model.record(Path(name)))
    return 0


def carry_out(flags: argparse.Namespace, stages: Sequence[Stage]) -> int:
    """Run stages and write the table. Returns the exit status."""
    from tests.gpu.stages.runner import TABLE, Runner, Setting, write_table

    if flags.list:
        print("\n".join(f"{stage.seconds:4.0f} s  {stage.name}" for stage in stages))
        return 0
    if unknown := set(flags.stages) - {stage.name for stage in stages}:
        return refuse(f"--stages: no stage is called {', '.join(sorted(unknown))}; --list names them")
    import torch

    if flags.device != "cuda":
        torch.set_num_threads(1)  # so that sums keep their order
    flags.out.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in stages if not flags.stages or stage.name in flags.stages]
    if flags.after is not None:
        chosen = chosen[[stage.name for stage in chosen].index(flags.after) + 1 :]
    seconds = flags.seconds or (SECONDS if flags.device == "cuda" else 3600.0)
    deadline = time.time() + seconds if flags.until is None else flags.until
    scratch = Path(tempfile.mkdtemp(prefix="first-run-"))
    timed = flags.device == "cuda" and torch.backends.cuda.is_built()
    device: Literal["cuda", "cpu"] = "cpu" if flags.device == "cpu" else "cuda"
    setting = Setting(device=device, tiny=flags.tiny, scratch=scratch, timed=timed)
    try:
        Runner(setting, flags.out, deadline, restarter(flags, deadline, scratch)).run(chosen, cleaner(timed))
        good = write_table(flags.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{flags.out / TABLE}")
    return 0 if good else 1


def cleaner(timed: bool) -> Callable[[], None]:
    """What makes the process as new after a stage. It raises where the GPU no longer answers."""
    from tests.support.rank_worker import globals_of_megatron, take_down

    clean = globals_of_megatron()

    def clean_up() -> None:
        import torch

        take_down(clean)
        if timed:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    return clean_up


def restarter(flags: argparse.Namespace, deadline: float, scratch: Path) -> Callable[[str], None]:
    """What replaces this process by one that goes on after a stage."""

    def restart(stage: str) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        words = [str(flags.out), "--device", flags.device, "--after", stage, "--until", str(deadline)]
        words += ["--tiny"] if flags.tiny else []
        words += ["--stages", *flags.stages] if flags.stages else []
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv[:1], *words])

    return restart


def refuse(message: str) -> int:
    """Say in one line why nothing is done."""
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
