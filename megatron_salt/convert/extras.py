"""The libraries that only conversions use: safetensors, transformers, gguf. They are optional, and imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from megatron_salt.errors import UserError


def needed(library: str) -> ModuleType:
    """A library without which the conversion cannot be done. Raises UserError that says how to install it."""
    module = optional(library)
    if module is None:
        raise UserError(
            f"this needs {library}, which is not installed: pip install 'megatron-salt[hf]', or pip install {library}"
        )
    return module


def optional(library: str) -> ModuleType | None:
    """A library, or None where it is not installed."""
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:  # it is there, and something that it needs is not
            raise UserError(f"{library} is installed and cannot be imported: {error}") from None
        return None
