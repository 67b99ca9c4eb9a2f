"""Warnings of megatron-core and torch that no user can act on, hidden before their first import.

megatron-core warns several times on every rank that apex is missing, which is not needed. torch warns that a collective has a
newer name.
"""

from __future__ import annotations

import warnings


def hide_library_warnings() -> None:
    """Hide them for the rest of this process. Programs call this, a library must not."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
