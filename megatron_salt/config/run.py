"""The whole configuration of a run, and its sections."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_type_hints

from megatron_salt.config.checkpoint import CheckpointConfig
from megatron_salt.config.data import DataConfig, TokenizerConfig
from megatron_salt.config.logging import LoggingConfig
from megatron_salt.config.model import ModelConfig
from megatron_salt.config.optimizer import OptimizerConfig
from megatron_salt.config.parallel import ParallelConfig
from megatron_salt.config.quantization import QuantizationConfig
from megatron_salt.config.salt import SaltConfig
from megatron_salt.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    salt: SaltConfig = field(default_factory=SaltConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def sections() -> dict[str, type]:
    """{name: dataclass} of RunConfig's sections."""
    return field_types(RunConfig)


@cache
def field_types(config_class: type) -> dict[str, Any]:
    """{field: type} of a dataclass, in the fields' order."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in fields(config_class)}
