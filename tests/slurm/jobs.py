"""Jobs of the shipped scripts on a cluster of virtual nodes: submit one, watch it, read what it left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster, wait_for
from tests.support.program import entries

ROOT = Path(__file__).parents[2]
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=100M", "--time=10")
ON_ONE_NODE = ("--nodes=1", *ON_TWO_NODES[1:])
TINY = ("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "16",
        "--micro-batch-size", "1", "--log-interval", "1", "--eval-iters", "0", "--valid-share", "0", "--lr-warmup-iters", "1")  # fmt: skip
BYTES = ("--tokenizer-type", "ByteLevelTokenizer")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


@dataclass(frozen=True)
class Job:
    """One job (or one element of an array: "7_1")."""

    cluster: Cluster
    number: str
    output: Path

    @property
    def state(self) -> str:
        """JobState, as Slurm calls it."""
        shown = self.cluster.ask("scontrol", "show", "job", "--oneliner", self.number)
        return re.findall(r"JobState=(\w+)", shown)[0]

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until the job's log has `text`, a regular expression; an AssertionError with the log where it ends before."""
        wait_for(lambda: re.search(text, self.log) or self.state in OVER, seconds, f"no {text!r} in\n{self.log}")
        assert re.search(text, self.log), f"{self.state} without {text!r}:\n{self.log}"

    def end(self, seconds: float = 240) -> str:
        """Wait until it is over; its last state."""
        wait_for(lambda: self.state in OVER, seconds, f"job {self.number} is not over:\n{self.log}")
        return self.state

    def complete(self, seconds: float = 240) -> str:
        """Wait for its success; its log."""
        assert self.end(seconds) == "COMPLETED", self.log
        return self.log


@dataclass(frozen=True)
class Site:
    """A cluster, and a directory for what its jobs write."""

    cluster: Cluster
    work: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PYTHON": sys.executable, "FP8": "0", "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    )

    def submit(self, script: str, *flags: str, options: tuple[str, ...] = ON_TWO_NODES, **environment: Any) -> Job:
        """sbatch OPTIONS examples/SCRIPT FLAGS."""
        output = self.work / "%x-%j.log"
        number = self._run(
            ["sbatch", "--parsable", f"--output={output}", *options, f"examples/{script}", *flags], environment
        ).strip()
        name = script.removesuffix(".sh")
        return Job(self.cluster, number, self.work / f"{name}-{number}.log")

    def pipeline(self, *options: str, **environment: Any) -> str:
        """bash examples/pipeline.sh; what it prints."""
        return self._run(["bash", "examples/pipeline.sh", *options], environment)

    def _run(self, command: list[str], environment: dict[str, Any]) -> str:
        given = {name: str(value) for name, value in environment.items()}
        ended = subprocess.run(command, cwd=ROOT, env=self.cluster.environment | self.environment | given, capture_output=True, text=True,
                               timeout=60, check=False)  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def tiny_processes(self, word: str) -> list[int]:
        """Numbers of the Python processes of jobs whose command line has `word`, as this machine counts them."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                words[0] == sys.executable.encode()
                and any(word.encode() in one for one in words)
                and int(path.name) != os.getpid()
            ):
                found.append(int(path.name))
        return sorted(found)


def last_step(run: Path) -> int:
    """The last step in a run's JSONL; 0 where there is none yet."""
    try:
        return max((entry["step"] for entry in entries(run)), default=0)
    except (OSError, ValueError):
        return 0
