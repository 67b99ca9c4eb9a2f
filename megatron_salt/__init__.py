"""Model-parallel pretraining on megatron-core, with a small language model helping a large one (SALT, arXiv 2410.18779).

Until a program of this package has imported its modules, Ctrl-C ends it with one line and status 130; after that `cli.exit_status` does.
A process that only imports the package is left alone.
"""

import os
import signal
import sys
from types import FrameType

__version__ = "0.2.0"


def leave_imports(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT while modules are imported. Nothing is written yet, and an exception could be lost in an import."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _is_program() -> bool:
    """Whether this process was started as `python -m megatron_salt...`, as a console script, or as a file in tools/."""
    if sys.argv[0] == "-m":
        return any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
    if sys.argv[0] not in sys.orig_argv:  # a worker of multiprocessing, which has its parent's sys.argv
        return False
    folder, name = os.path.split(os.path.abspath(sys.argv[0]))
    return name.startswith("salt-") or folder == os.path.join(os.path.dirname(os.path.dirname(__file__)), "tools")


if sys.argv and signal.getsignal(signal.SIGINT) is signal.default_int_handler and _is_program():
    signal.signal(signal.SIGINT, leave_imports)
