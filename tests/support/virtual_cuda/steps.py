"""What runs of the package need under virtual CUDA: labels of the training loop, and short measurements."""

from __future__ import annotations

import functools
from typing import Any

from tests.support.virtual_cuda.recorder import Recorder


def label_steps(recorder: Recorder) -> None:
    """Label what happens inside `train_step` "step N", and what follows it "after step N", N from 1 in each start. Once in a process."""
    from megatron_salt.train import loop

    original: Any = loop.train_step

    @functools.wraps(original)
    def train_step(*positional: Any, **named: Any) -> Any:
        number = 1 if not recorder.label.startswith("after step") else int(recorder.label.split()[-1]) + 1
        recorder.label = f"step {number}"
        try:
            return original(*positional, **named)
        finally:
            recorder.label = f"after step {number}"

    loop.train_step = train_step


def shorten_measurements() -> None:
    """The head's kernels are measured at start on few logits: Triton's interpreter is slow."""
    from megatron_salt.salt import head_cost

    if hasattr(head_cost, "_LOGITS"):
        head_cost._LOGITS["cuda"] = 1 << 11
