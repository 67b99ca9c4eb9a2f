"""Differences between the supported releases of megatron-core (0.16.1 to 0.19.x). No other module asks for the release."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

import megatron.core
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec


def megatron_core_version() -> str:
    """The installed release without its local build tag."""
    return megatron.core.__version__.split("+")[0]


def takes(function: Callable, parameter: str) -> bool:
    """Whether a function has a parameter of that name."""
    return parameter in inspect.signature(function).parameters


def mlp_of_layer(submodules: MLPSubmodules) -> Any:
    """The MLP in the spec of a layer: a ModuleSpec, or for 0.19.x, which warns of that, a function."""
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


@contextmanager
def quiet_checkpointing() -> Iterator[None]:
    """Hide deprecation warnings of torch and megatron-core while a checkpoint is written or read."""
    logger = logging.getLogger("megatron.core.dist_checkpointing")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def begin_sharded_save(strategy: Any, tensors: dict, directory: Path) -> Any:
    """Plan a torch_dist save with megatron-core's own writer, and return its AsyncRequest. 0.19.x has another default writer."""
    if takes(strategy.async_save, "async_strategy"):
        return strategy.async_save(tensors, directory, async_strategy="mcore")
    return strategy.async_save(tensors, directory)
