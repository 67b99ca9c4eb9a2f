"""benchmarks/kd_loss.py --device cuda under virtual CUDA: `python -m tests.benchmarks.kd_loss_on_virtual_cuda FLAGS`.

test_kd_loss.py runs this in a process of its own. Prints what the benchmark prints, then the faults that were recorded, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings

from tests.support.virtual_cuda import install


def main(words: list[str]) -> None:
    recorder = install()
    warnings.filterwarnings("ignore")
    from benchmarks import kd_loss

    kd_loss.main(["--device", "cuda", *words])
    print(json.dumps([str(fault) for fault in recorder.take().faults]))


if __name__ == "__main__":
    main(sys.argv[1:])
