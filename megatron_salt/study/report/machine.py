"""The machine on which a study's report is written."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from megatron_salt import __version__
from megatron_salt.train.dry_run import versions

_GIB = 1 << 30


def this_machine() -> tuple[str, ...]:
    """The class of this machine, without its name, and the versions that runs have here: one line each. Raises MachineError."""
    processor = "unknown processor"
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass  # no /proc here
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    _, *libraries = versions()  # the first line names the machine
    return (
        f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB of memory",
        ", ".join([f"megatron_salt {__version__}", f"Python {platform.python_version()}", *libraries]),
    )
