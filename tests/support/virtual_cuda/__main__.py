"""Run pretrain under virtual CUDA and print what was recorded: `python -m tests.support.virtual_cuda -- FLAGS`, or by torchrun -m."""

from __future__ import annotations

import os
import sys

from tests.support.virtual_cuda import install


def main(words: list[str]) -> int:
    """Run pretrain with these flags. Returns its status, or 1 where there was a fault."""
    recorder = install()
    from megatron_salt import pretrain
    from tests.support.virtual_cuda.steps import label_steps, shorten_measurements

    label_steps(recorder)
    shorten_measurements()
    status = pretrain.main(words[1:] if words[:1] == ["--"] else words)
    report = recorder.take()
    print(f"rank {os.environ.get('RANK', '0')} under virtual CUDA\n{report.text()}", file=sys.stderr)
    return status or int(bool(report.faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
