"""The whole configuration of a run: one section for each module of this folder."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_salt.config.checkpoint import CheckpointConfig
from megatron_salt.config.data import DataConfig, TokenizerConfig
from megatron_salt.config.logging import LoggingConfig
from megatron_salt.config.model import ModelConfig
from megatron_salt.config.optimizer import OptimizerConfig
from megatron_salt.config.parallel import ParallelConfig
from megatron_salt.config.quantization import QuantizationConfig
from megatron_salt.config.salt import SaltConfig
from megatron_salt.config.training import TrainingConfig


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

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
