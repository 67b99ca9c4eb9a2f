"""sbatch, squeue, scancel and sacct that only remember, as programs on PATH.

State: DIR/jobs.json, {number: [name, state, words of sbatch]}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from megatron_salt.files import write_whole

_PROGRAM = """#!{python}
import json, sys
from pathlib import Path
path, words = Path({path!r}), sys.argv[1:]
jobs = json.loads(path.read_text())
program = Path(sys.argv[0]).name
if (path.parent / "silent").exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
if program == "sbatch":
    if any(word == "--partition=none" for word in words):
        sys.exit("sbatch: error: invalid partition specified: none")
    number = str(len(jobs) + 100)
    jobs[number] = [next(word[11:] for word in words if word.startswith("--job-name=")), "PENDING", words]
    path.with_suffix(".new").write_text(json.dumps(jobs))
    path.with_suffix(".new").rename(path)
    print(number + ";cluster")
elif program == "squeue":
    assert words == ["--noheader", "--me", "--format=%i|%j|%T"], words
    for number, (name, state, _) in jobs.items():
        if state in ("PENDING", "RUNNING", "COMPLETING"):
            print(number, name, state, sep="|")
elif program == "scancel":
    jobs[words[0]][1] = "CANCELLED"
    path.write_text(json.dumps(jobs))
else:
    number = next(word[7:] for word in words if word.startswith("--jobs="))
    print(jobs[number][1])
"""


class FakeSlurm:
    """The programs, first on PATH."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory.mkdir()
        self._path = directory / "jobs.json"
        self._path.write_text("{}")
        for name in ("sbatch", "squeue", "scancel", "sacct"):
            (directory / name).write_text(_PROGRAM.format(python=sys.executable, path=str(self._path)))
            (directory / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")

    @property
    def jobs(self) -> dict[str, tuple[str, str, list[str]]]:
        """{number: (name, state, words of sbatch)} in the order of submission."""
        return {number: (name, state, words) for number, (name, state, words) in json.loads(self._path.read_text()).items()}

    @property
    def names(self) -> list[str]:
        """Names of all jobs that were ever submitted."""
        return [name for name, _, _ in self.jobs.values()]

    def set(self, number: str, state: str) -> None:
        """Let a job have this state. Only PENDING, RUNNING and COMPLETING are in the queue."""
        jobs = json.loads(self._path.read_text())
        jobs[number][1] = state
        write_whole(self._path, json.dumps(jobs).encode())

    def silent(self, is_silent: bool) -> None:
        """Whether the controller does not answer."""
        (self._path.parent / "silent").touch() if is_silent else (self._path.parent / "silent").unlink()
