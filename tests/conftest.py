"""Which tests run, and the end of the pool of ranks.

`pytest` runs all cases except those marked `full`. `--full` (`make test-full`) runs those too. `--short` (`make test-short`)
runs the last case of each test, without those marked `full` or `long`. `--slurm` runs only cases marked `slurm`, `--faults`
only cases marked `faults`. Tests marked `gpu` are skipped without a GPU. Files with tests marked `long` come first, so that one core
does not wait at the end for another's last file.
"""

from __future__ import annotations

import collections
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the machine's cores belong to the ranks, and sums keep their order

import pytest

from tests.support import ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    which = parser.getgroup("megatron_salt")
    which.addoption("--full", action="store_true", help="every case of every grid")
    which.addoption(
        "--slurm", action="store_true", help="the tests on a Slurm cluster, which they start (make test-slurm), and no others"
    )
    which.addoption(
        "--faults", action="store_true", help="kills, damage and mutations in great numbers (make test-faults), and no others"
    )
    which.addoption("--short", action="store_true", help="the last case of every test, without long ones")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = items if config.getoption("--full") else [item for item in items if not item.get_closest_marker("full")]
    for alone in ("slurm", "faults"):
        wanted = [item for item in wanted if bool(item.get_closest_marker(alone)) == config.getoption(f"--{alone}")]
    if config.getoption("--short"):
        last = {item.nodeid.partition("[")[0]: item for item in wanted if not item.get_closest_marker("long")}
        wanted = list(last.values())
    kept = set(wanted)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = long_files_first(wanted)
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def long_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Files with a `long` test, then the others; in each of both the files with the most tests first. Tests of a file keep their order."""
    count = collections.Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("long")}
    return sorted(items, key=lambda item: (item.path not in slow, -count[item.path], item.path))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what `--faults` counted."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "counts":
                terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {value}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_sessionfinish() -> None:
    ranks.shutdown()
