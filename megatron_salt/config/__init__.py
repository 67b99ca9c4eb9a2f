"""The configuration of a run: a tree of frozen dataclasses, in which each leaf field is a flag.

Precedence: defaults < `--config file.yaml` < flags; `cli.py` reads them. Flags are flat and have Megatron-LM's names,
so leaf names are unique in the whole tree. The docstring of a field is its help text; --help keeps its lines.
`__post_init__` checks one section by itself. What needs two sections is checked where they first meet.
The architecture defaults are Megatron-LM's, except for dropout, which is off.
"""

from __future__ import annotations

from megatron_salt.config.checkpoint import CheckpointConfig
from megatron_salt.config.checks import flag
from megatron_salt.config.data import DataConfig, TokenizerConfig
from megatron_salt.config.logging import LoggingConfig
from megatron_salt.config.model import ModelConfig
from megatron_salt.config.optimizer import OptimizerConfig
from megatron_salt.config.parallel import ParallelConfig
from megatron_salt.config.quantization import QuantizationConfig
from megatron_salt.config.run import RunConfig
from megatron_salt.config.salt import SaltConfig
from megatron_salt.config.training import TrainingConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "QuantizationConfig",
    "RunConfig",
    "SaltConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "flag",
]
