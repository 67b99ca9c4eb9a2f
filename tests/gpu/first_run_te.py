"""The first run of Transformer Engine and FP8 on a GPU: correctness against torch's layers and bfloat16, then step times.

    python tests/gpu/first_run_te.py OUT

A call of its own beside tests/gpu/first_run.py, with the same flags and the same kind of results. It compares with what the same GPU
computes without Transformer Engine. Where that is not installed, every stage says so.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.first_run import main

if __name__ == "__main__":
    sys.exit(main("tests.gpu.stages.engine"))
