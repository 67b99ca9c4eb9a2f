"""Weights by seed that are the same on every device, and numbers that a CPU computed with them.

Initial weights come from the generator of the device, so a GPU and a CPU start apart. Here each weight comes from numpy's RandomState,
whose stream is frozen, by a seed made of the weight's name. tests/gpu/expected/ has what a CPU computed; `first_run.py --record` computes
it anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_salt.train import build
from megatron_salt.train.step import Student, unwrap

EXPECTED = Path(__file__).resolve().parents[1] / "expected"
STD = 0.05


def seed_weights(student: Student) -> str:
    """Overwrite all weights of a student on one rank. Returns their hash."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for chunk in student.chunks:
            for name, parameter in sorted(unwrap(chunk).named_parameters()):
                random = np.random.RandomState(zlib.crc32(name.encode()))
                # uniform: exact arithmetic, the same bits everywhere
                drawn = (STD * 3**0.5 * (2 * random.random_sample(tuple(parameter.shape)) - 1)).astype(np.float32)
                if "norm" in name and name.endswith("weight"):
                    drawn += 1
                digest.update(drawn.tobytes())
                parameter.copy_(torch.from_numpy(drawn))
    student.optimizer.reload_model_params()
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def programs_with_seeded_weights() -> Iterator[None]:
    """Inside, `pretrain.main` starts from seeded weights."""
    build_student = build.build_student

    def seeded(*arguments: Any) -> Student:
        student = build_student(*arguments)
        seed_weights(student)
        return student

    with mock.patch.object(build, "build_student", seeded):
        yield


def expected(name: str) -> dict[str, Any]:
    """The recorded numbers of one stage."""
    return json.loads((EXPECTED / f"{name}.json").read_text())
