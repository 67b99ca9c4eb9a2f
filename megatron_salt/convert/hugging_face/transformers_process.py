"""What transformers computes of a directory or of a GGUF file: logits of a prompt, and losses on the reference batch.

transformers runs in a process of its own (transformers_outputs.py), in float32 with the weights rounded as the checkpoint holds them. It
needs the memory of the whole model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_salt.convert.verify import PROMPT, Outputs
from megatron_salt.data.reference_batch import fixed_batch
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file."""

    path: Path
    keys: Mapping[str, Any]
    """Of its config: what the file says, and transformers does not read."""


def outputs_of_transformers(
    source: Path | GgufSource, dtype: torch.dtype, vocabulary_size: int, lengths: tuple[int, ...]
) -> Outputs | None:
    """What transformers computes of a directory or a GGUF file; None where it is not installed. UserError where it cannot load it."""
    if importlib.util.find_spec("transformers") is None:
        return None
    batch = fixed_batch(vocabulary_size, lengths[-1], lengths)
    arrays: dict[str, Any] = {
        "tokens": torch.cat([part.tokens for part in batch]).numpy(),
        "labels": torch.cat([part.labels for part in batch]).numpy(),
        "mask": torch.cat([part.loss_mask for part in batch]).numpy(),
        "prompt": np.array(PROMPT),
    }
    root = str(Path(__file__).parents[3])
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, *_python_path()]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        inputs, out = Path(scratch) / "in.npz", Path(scratch) / "out.npz"
        np.savez(inputs, **arrays)
        module, kind = "megatron_salt.convert.hugging_face.transformers_outputs", str(dtype).removeprefix("torch.")
        path, keys = (source.path, source.keys) if isinstance(source, GgufSource) else (source, {})
        command = [sys.executable, "-m", module, str(path.absolute()), kind, str(inputs), str(out), json.dumps(keys)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = ([line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing (out of memory?)"])[-1]
            raise UserError(f"{path}: transformers cannot compute its losses: {last.strip()}; --no-verify goes without it")
        computed = np.load(out)
        return Outputs(tuple(float(loss) for loss in computed["losses"]), torch.from_numpy(computed["logits"]))


def _python_path() -> list[str]:
    return [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
