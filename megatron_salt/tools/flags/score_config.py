"""Flags of tools/score_data.py. Docstrings of fields are their help texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_salt.config import TokenizerConfig
from megatron_salt.config.checks import at_least, within
from megatron_salt.config.parallel import Device
from megatron_salt.data.order import SEEDS, is_seed
from megatron_salt.errors import UserError
from megatron_salt.preprocess.sharding import parse_shard


@dataclass(frozen=True)
class ScoreConfig:
    """Score the windows of a dataset with a teacher."""

    teacher_load: str
    """Directory of the teacher's checkpoints (its latest is taken), or one iter_* directory: an early one, in the paper."""

    data_path: tuple[str, ...]
    """Prefixes of .bin/.idx pairs, in the order of the training run's --data-path. Weights between them are allowed and ignored."""

    output: str
    """Directory of the score index, the same for all its jobs."""

    shard: str = "0/1"
    """i/n: score the i-th of n parts of the samples, i from 0 to n-1. Every job of an index has the same n."""

    sample: float | None = None
    """Score each window with this probability, above 0 and below 1. select_data.py chooses among scored windows. Default: score all."""

    sample_seed: int | None = None
    """With --sample: the seed that decides which windows are scored. Every job of an index has the same. Default: 1234."""

    seq_length: int | None = None
    """Tokens in a window, equal to the training run's --seq-length. Default: the teacher's."""

    score_top_k: tuple[int, ...] = (1, 10, 50, 100)
    """Values of k for the scores. A token is learnable if the teacher finds fewer than k ids more likely. The paper uses 10."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each of the teacher's layers."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages of the teacher. The remaining ranks form data-parallel replicas."""

    micro_batch_size: int = 4
    """Windows in one forward pass. Every job of an index has the same, because rounding may depend on it."""

    block_samples: int = 4096
    """Windows that are written together; a multiple of --micro-batch-size. A killed job repeats fewer windows than this."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format in which the teacher computes. Default: the one of its training."""

    eod_mask_loss: bool = False
    """As in the training run: tokens that follow an end-of-document id get no loss and do not count."""

    reset_position_ids: bool = False
    """As in the training run: position ids restart after each end-of-document id."""

    reset_attention_mask: bool = False
    """As in the training run: tokens attend only to tokens of their own document."""

    verify_data: bool = False
    """Hash every byte of the data at start instead of a fixed sample of blocks."""

    allow_duplicate_inputs: bool = False
    """Accept datasets that hold the same data twice, as the training run's flag of this name does."""

    loss_chunk_mib: int | None = None
    """MiB of memory for the float32 logits of one chunk of tokens. Default: 256; on a GPU also at least 2048 tokens."""

    teacher_max_dropped_mass: float = 0.01
    """Refuse a teacher that gives more than this share of its probability to ids that the data's tokenizer does not share, as in training.
    Scores are over the ids that both have."""

    exit_file: str | None = None
    """Leave when this file appears, as after SIGTERM and SIGUSR1. It is not deleted; a start is refused while it exists."""

    log_interval: int = 1
    """Blocks between lines of progress."""

    device: Device = "auto"
    """Where every rank computes, as in the training run: auto, cuda or cpu."""

    distributed_timeout_minutes: float = 10.0
    """Minutes after which a waiting collective fails."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "micro_batch_size", "block_samples", "loss_chunk_mib", "log_interval")
        if self.block_samples % self.micro_batch_size:
            raise UserError(
                f"--block-samples {self.block_samples} is not a multiple of --micro-batch-size {self.micro_batch_size}"
            )
        if not self.score_top_k or min(self.score_top_k) < 1 or len(set(self.score_top_k)) < len(self.score_top_k):
            raise UserError(
                f"--score-top-k takes different numbers of at least 1, got {' '.join(map(str, self.score_top_k)) or 'none'}"
            )
        if not self.distributed_timeout_minutes > 0:
            raise UserError(f"--distributed-timeout-minutes must be above 0, got {self.distributed_timeout_minutes}")
        if self.sample is not None and not 0 < self.sample < 1:
            raise UserError(f"--sample must be above 0 and below 1, got {self.sample}; without it every window is scored")
        if self.sample_seed is not None and (self.sample is None or not is_seed(self.sample_seed)):
            raise UserError(f"--sample-seed {self.sample_seed} needs --sample, and is {SEEDS}")
        within(self, 0.0, 1.0, "teacher_max_dropped_mass")
        parse_shard(self.shard)
