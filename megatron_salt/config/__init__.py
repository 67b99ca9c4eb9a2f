"""What a run is: one tree of frozen dataclasses, one leaf a flag.

Precedence is defaults < `--config file.yaml` < flags (`cli.py` does the reading). Flags are flat and carry
Megatron-LM's names, so leaf names are unique over the whole tree; a field's docstring is its help text:
one sentence a line, because --help keeps the lines.
`__post_init__` checks what one section knows by itself; what needs two sections is checked where they first meet.
Architecture defaults are Megatron-LM's, except for dropout, which is off.
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
