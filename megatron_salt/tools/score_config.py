"""Flags of score_data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_salt.config import TokenizerConfig
from megatron_salt.data.order import SEEDS, is_seed
from megatron_salt.errors import UserError
from megatron_salt.preprocess.sharding import parse_shard


@dataclass(frozen=True)
class ScoreConfig:
    """Score the windows of a dataset with a teacher."""

    teacher_load: str
    """Directory of the teacher's checkpoints (its latest is taken), or one iter_* directory: an early one, in the paper."""

    data_path: tuple[str, ...]
    """Prefixes of .bin/.idx pairs in the order of the training run's --data-path; weights may be there, and mean nothing here."""

    output: str
    """Directory of the index. All jobs of one index name the same."""

    shard: str = "0/1"
    """i/n: score the i-th of n parts of the samples, i from 0 to n-1. Every job of an index has the same n."""

    sample: float | None = None
    """Score a random part: the chance of each window, above 0 and below 1. select_data.py then chooses among these. Default: score all."""

    sample_seed: int | None = None
    """With --sample: another seed scores other windows. Part of the index. Default: 1234."""

    seq_length: int | None = None
    """Tokens of a window: the training run's --seq-length. Default: the teacher's."""

    score_top_k: tuple[int, ...] = (1, 10, 50, 100)
    """The k of the scores: a token counts as learnable where fewer than k ids are likelier to the teacher. The paper has 10."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each of the teacher's layers."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages of the teacher. What both leave over is data parallelism."""

    micro_batch_size: int = 4
    """Windows of one forward pass. Part of the index: another one may round otherwise."""

    block_samples: int = 4096
    """Windows that are written together, a multiple of --micro-batch-size. What a killed job has to do again is less than this."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """What the teacher computes in. Default: what it was trained in."""

    eod_mask_loss: bool = False
    """As the training run: no score where the input token is the end-of-document id."""

    reset_position_ids: bool = False
    """As the training run: positions start again after each end-of-document id."""

    reset_attention_mask: bool = False
    """As the training run: tokens attend inside their own document alone."""

    verify_data: bool = False
    """Hash every byte of the data at start instead of a fixed sample of blocks."""

    allow_duplicate_inputs: bool = False
    """Take datasets that are the same data twice, as the training run's flag of this name."""

    loss_chunk_mib: int = 256
    """Memory for the logits of one chunk of tokens, float32."""

    exit_file: str | None = None
    """Leave when this file appears. It is not deleted, and a start that finds it is refused. SIGTERM and SIGUSR1 do the same."""

    log_interval: int = 1
    """Blocks between lines of progress."""

    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer fails."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "block_samples", "loss_chunk_mib", "log_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
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
        parse_shard(self.shard)
