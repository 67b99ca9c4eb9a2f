"""What the GPU tests share: a world of one rank in this process, and why a test cannot run here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest


@pytest.fixture
def world() -> Iterator[None]:
    """A world of one rank on the GPU, in this process."""
    import torch

    from megatron_salt.parallel.launch import distributed

    torch.backends.cuda.matmul.allow_tf32 = False
    with distributed(timedelta(minutes=2)):
        yield
