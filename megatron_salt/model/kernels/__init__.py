"""Passes over the output head's logits; here is what both forms of them must agree on."""

from __future__ import annotations

import os

ALIGNMENT = 64
"""Columns. Where kernels run, rows of logits start at a multiple of it."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether a CPU runs the kernels. Triton reads this as its functions are defined, so it cannot change later."""
