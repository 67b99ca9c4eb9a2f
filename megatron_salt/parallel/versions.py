"""What differs between the supported megatron-core releases (0.16.1 to 0.19.x): asked here, and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import megatron_salt.parallel.cpu  # noqa: F401  (before megatron)
import megatron.core


def megatron_core_version() -> str:
    """The installed release, without its local build tag."""
    return megatron.core.__version__.split("+")[0]


def takes(function: Callable, parameter: str) -> bool:
    """Whether a function of megatron-core has a parameter of that name."""
    return parameter in inspect.signature(function).parameters
