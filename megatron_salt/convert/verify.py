"""Whether an imported model computes what transformers computes: logits of a prompt, and losses on the reference batch.

transformers runs in a process of its own (transformers_outputs.py), in float32 with the weights rounded as the checkpoint holds them. It
needs the memory of the whole model.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_salt.data.reference_batch import fixed_batch
from megatron_salt.errors import UserError

PROMPT = 16
"""Tokens of the first sequence of the reference batch whose logits are compared."""
TOLERANCE = 1e-4
"""Of a loss, and of the largest logit: float32 sums of a few thousand terms in another order stay far below it."""


@dataclass(frozen=True)
class Outputs:
    """What a model computes on the reference batch."""

    losses: tuple[float, ...]
    """Nats a token, one for each sequence."""
    logits: Tensor
    """float32 [PROMPT or fewer, vocabulary]: of the first tokens of the first sequence."""


def outputs_of_transformers(
    directory: Path, dtype: torch.dtype, vocabulary_size: int, lengths: tuple[int, ...]
) -> Outputs | None:
    """The same from transformers; None where it is not installed. Raises UserError where it cannot load the directory."""
    if importlib.util.find_spec("transformers") is None:
        return None
    batch = fixed_batch(vocabulary_size, lengths[-1], lengths)
    arrays: dict[str, Any] = {
        "tokens": torch.cat([part.tokens for part in batch]).numpy(),
        "labels": torch.cat([part.labels for part in batch]).numpy(),
        "mask": torch.cat([part.loss_mask for part in batch]).numpy(),
        "prompt": np.array(PROMPT),
    }
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, *_python_path()]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        inputs, out = Path(scratch) / "in.npz", Path(scratch) / "out.npz"
        np.savez(inputs, **arrays)
        module, kind = "megatron_salt.convert.transformers_outputs", str(dtype).removeprefix("torch.")
        command = [sys.executable, "-m", module, str(directory.absolute()), kind, str(inputs), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = ([line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing (out of memory?)"])[-1]
            raise UserError(f"{directory}: transformers cannot compute its losses: {last.strip()}; --no-verify goes without it")
        computed = np.load(out)
        return Outputs(tuple(float(loss) for loss in computed["losses"]), torch.from_numpy(computed["logits"]))


def _python_path() -> list[str]:
    return [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


def refuse_other_outputs(own: Outputs, theirs: Outputs, where: str) -> None:
    """Raise UserError where the imported model computes something else than transformers."""
    scale = float(theirs.logits.abs().max())
    difference = float((own.logits - theirs.logits).abs().max())
    if not difference <= TOLERANCE * scale:  # not (a <= b) also rejects NaN
        raise UserError(
            f"{where}: the imported model is not what transformers computes: logits up to {scale:.4g} differ by up to {difference:.4g}"
        )
    for loss, their_loss in zip(own.losses, theirs.losses, strict=True):
        if not math.isclose(loss, their_loss, rel_tol=TOLERANCE):
            raise UserError(
                f"{where}: the imported model is not what transformers computes: loss {loss:.6f}, in transformers {their_loss:.6f}"
            )
