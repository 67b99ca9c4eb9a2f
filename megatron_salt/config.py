"""What a run is: one tree of frozen dataclasses, one leaf a flag.

Precedence is defaults < `--config file.yaml` < flags (`cli.py` does the reading). Flags are flat and carry
Megatron-LM's names, so leaf names are unique over the whole tree; a field's docstring is its help text.
`__post_init__` checks what one section knows by itself; what needs two sections is checked where they first meet.
Architecture defaults are Megatron-LM's, except for dropout, which is off.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Literal

from megatron_salt.errors import UserError


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def _at_least(section: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= minimum:  # so phrased, it refuses nan too
            raise UserError(f"{flag(name)} must be at least {minimum}, got {value}")
        if value == inf:
            raise UserError(f"{flag(name)} must be finite, got {value}")


def _above_zero(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < inf:
            raise UserError(f"{flag(name)} must be above 0 and finite, got {value}")


def _within(section: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{flag(name)} must lie in [{low}, {high}], got {value}")


def _from_zero_to_below_one(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not 0.0 <= value < 1.0:
            raise UserError(f"{flag(name)} must be at least 0 and below 1, got {value}")


_FLOAT32 = (1.1754943508222875e-38, 3.4028234663852886e38)  # smallest normal number and largest one
_LARGEST_COUNT = 2**62


def _representable(section: Any) -> None:
    """Refuse numbers that the calculation cannot hold: floats outside float32, counts that do not fit into int64."""
    for leaf in fields(section):
        value = getattr(section, leaf.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and number != 0 and not _FLOAT32[0] <= abs(number) <= _FLOAT32[1]:
                raise UserError(
                    f"{flag(leaf.name)} must be 0 or between {_FLOAT32[0]:.3g} and {_FLOAT32[1]:.3g} in size, as float32 "
                    f"holds it, got {number}"
                )
            if isinstance(number, int) and abs(number) > _LARGEST_COUNT:
                raise UserError(f"{flag(leaf.name)} must be at most {_LARGEST_COUNT} in size, got {number}")


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's architecture. Saved in every checkpoint; a checkpoint of another architecture is refused."""

    num_layers: int = 12
    """Transformer layers in the whole model."""

    hidden_size: int = 768
    """Width of the residual stream."""

    ffn_hidden_size: int | None = None
    """Width of the MLP; default 4 x hidden size, and with --swiglu 8/3 x hidden size rounded up to a multiple of 64."""

    num_attention_heads: int = 12
    """Query heads."""

    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); default: as many as query heads."""

    kv_channels: int | None = None
    """Width of one head; default: hidden size / query heads."""

    max_position_embeddings: int | None = None
    """Longest context; the size of the table of learned positions. Default: --seq-length."""

    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """How a token knows its place."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    rotary_percent: float = 1.0
    """Share of each head's channels that are rotated."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Normalisation before attention, before the MLP and at the end."""

    norm_epsilon: float = 1e-5
    """Added to the variance inside a norm."""

    qk_layernorm: bool = False
    """Normalise queries and keys per head before attention."""

    swiglu: bool = False
    """Gated MLP with SiLU. Default without this and --squared-relu: GELU."""

    squared_relu: bool = False
    """Squared ReLU in the MLP."""

    disable_bias_linear: bool = False
    """No bias in the linear layers."""

    untie_embeddings_and_output_weights: bool = False
    """Give the output layer a weight of its own instead of the word embeddings."""

    init_method_std: float = 0.02
    """Standard deviation of initial weights; output projections are scaled down by sqrt(2 x layers)."""

    hidden_dropout: float = 0.0
    """Dropout after embedding, attention and MLP."""

    attention_dropout: float = 0.0
    """Dropout of attention weights."""

    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, whatever the tensor-parallel size, so that checkpoints reshard.
    Must be a multiple of the tensor-parallel size. Padded ids take no part in the loss."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "make_vocab_size_divisible_by",
        )
        _above_zero(self, "rotary_base", "norm_epsilon", "init_method_std")
        _within(self, 0.0, 1.0, "rotary_percent", "norm_epsilon", "init_method_std")
        _from_zero_to_below_one(self, "hidden_dropout", "attention_dropout")
        _representable(self)
        if self.swiglu and self.squared_relu:
            raise UserError("--swiglu and --squared-relu name two different activations; give one")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"--hidden-size {self.hidden_size} is not divisible by --num-attention-heads "
                f"{self.num_attention_heads}; change one, or give --kv-channels"
            )
        if self.num_attention_heads % self.query_groups:
            raise UserError(
                f"--num-attention-heads {self.num_attention_heads} is not divisible by --num-query-groups {self.query_groups}"
            )

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        """Channels of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64 if self.swiglu else 4 * self.hidden_size

    def padded_vocabulary_size(self, vocabulary_size: int) -> int:
        """Rows of the embedding for a tokenizer with `vocabulary_size` ids."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocabulary_size // multiple) * multiple


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer."""

    pipeline_model_parallel_size: int = 1
    """Ranks that each hold a run of layers."""

    num_virtual_stages_per_pipeline_rank: int = 1
    """Model chunks a pipeline rank holds (interleaved schedule when above 1)."""

    context_parallel_size: int = 1
    """Ranks that split each sequence."""

    sequence_parallel: bool = False
    """Split activations outside attention and MLP along the sequence, over the tensor-parallel ranks."""

    decoder_first_pipeline_num_layers: int | None = None
    """Layers in the first pipeline stage; the others share the rest evenly."""

    decoder_last_pipeline_num_layers: int | None = None
    """Layers in the last pipeline stage; the others share the rest evenly."""

    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer when layers are spread over stages."""

    account_for_loss_in_pipeline_split: bool = False
    """Count the output head and loss as one layer when layers are spread over stages."""

    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while backward is still running."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward is already running; needs the distributed optimizer and --overlap-grad-reduce."""

    ddp_bucket_size: int | None = None
    """Parameters per gradient bucket under --overlap-grad-reduce; default: megatron-core's choice."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in backward: whole layers, or core attention alone."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: equal chunks of layers, or the first layers of each stage."""

    recompute_num_layers: int | None = None
    """With full recompute: layers per chunk (uniform) or recomputed layers per stage (block)."""

    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run."""

    rendezvous_timeout_minutes: float = 10.0
    """A run whose ranks have not all joined after this ends; the missing ranks are named every 30 seconds."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_virtual_stages_per_pipeline_rank",
            "context_parallel_size",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "recompute_num_layers",
            "ddp_bucket_size",
        )
        _above_zero(self, "distributed_timeout_minutes", "rendezvous_timeout_minutes")
        _representable(self)
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1, got 1")
        if self.num_virtual_stages_per_pipeline_rank > 1 and self.pipeline_model_parallel_size == 1:
            raise UserError(
                f"--num-virtual-stages-per-pipeline-rank {self.num_virtual_stages_per_pipeline_rank} needs "
                "--pipeline-model-parallel-size above 1, got 1"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UserError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
        if self.recompute_granularity == "full" and (self.recompute_method is None or self.recompute_num_layers is None):
            raise UserError("--recompute-granularity full needs --recompute-method and --recompute-num-layers")
        if self.recompute_granularity != "full" and (self.recompute_method or self.recompute_num_layers):
            raise UserError(
                "--recompute-method and --recompute-num-layers belong to --recompute-granularity full, "
                f"got --recompute-granularity {self.recompute_granularity}"
            )

    @property
    def replica_ranks(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def virtual_stages(self) -> int | None:
        """Model chunks per pipeline rank as megatron-core spells it: None without interleaving."""
        stages = self.num_virtual_stages_per_pipeline_rank
        return stages if stages > 1 else None


@dataclass(frozen=True)
class TrainingConfig:
    """How long, on how much at a time, in which precision."""

    seq_length: int = 1024
    """Tokens of one sample."""

    micro_batch_size: int = 1
    """Samples of one forward pass on one replica."""

    global_batch_size: int | None = None
    """Samples of one step over all replicas; default: one microbatch a replica."""

    train_iters: int | None = None
    """Steps of the run."""

    train_samples: int | None = None
    """Samples of the run, instead of --train-iters; must be a multiple of --global-batch-size."""

    seed: int = 1234
    """Seeds initial weights, dropout and the order of samples."""

    bf16: bool = False
    """Train in bfloat16, with float32 main parameters and gradient reduction; default: float32."""

    transformer_impl: Literal["torch", "transformer_engine"] | None = None
    """Implementation of the student's and the teacher's layers: plain torch modules with scaled-dot-product attention, or Transformer Engine's. Default: transformer_engine with --bf16 on a GPU where it is installed, else torch. Checkpoints interchange."""

    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time in the output head; default: what fits --loss-chunk-mib."""

    loss_chunk_mib: int = 256
    """Memory budget from which --loss-chunk-tokens is derived."""

    eval_interval: int = 1000
    """Steps between evaluations on held-out data."""

    eval_iters: int = 0
    """Global batches of one evaluation; 0 turns evaluation off."""

    skip_samples: tuple[str, ...] = ()
    """Ranges A:B of consumed samples to jump over, such as 51200:56320 after a loss spike. Pure: the same flags give the same order."""

    exit_interval: int | None = None
    """Save and leave when the step is a multiple of this."""

    exit_duration_in_mins: float | None = None
    """Save and leave after this many minutes."""

    exit_signal_handler: bool = False
    """Save and leave when SIGTERM or SIGUSR1 arrives."""

    exit_file: str | None = None
    """Save and leave when this file appears, from whatever hand. It is not deleted, and a start that finds it is refused."""

    outcome_file: str | None = None
    """For a launcher: file that gets one line when the run ends, "done", "left" (it saved and wants to go on), "refused" (a mistake that another start would repeat), "unsaved" (the last checkpoint is not on disk) or "nonfinite", the step, the Slurm job (- without one) and its restart, and the reason. None appears where the run died."""

    max_nonfinite_steps: int = 10
    """So many steps in a row with a non-finite gradient norm end the run. Each such step leaves parameters and optimizer untouched."""

    manual_gc: bool = False
    """Collect Python garbage at the same step on every rank instead of whenever Python likes."""

    manual_gc_interval: int = 100
    """Steps between collections under --manual-gc; 0: never."""

    profile: bool = False
    """Write a torch profiler trace of --profile-step-start to --profile-step-end to --tensorboard-dir."""

    profile_step_start: int = 10
    """First profiled step."""

    profile_step_end: int = 12
    """First step that is no longer profiled."""

    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that profile."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "seq_length",
            "micro_batch_size",
            "global_batch_size",
            "train_iters",
            "train_samples",
            "loss_chunk_tokens",
            "loss_chunk_mib",
            "eval_interval",
            "exit_interval",
            "max_nonfinite_steps",
        )
        _at_least(self, 0, "eval_iters", "manual_gc_interval", "profile_step_start", "exit_duration_in_mins", "seed")
        _representable(self)
        if self.train_iters is not None and self.train_samples is not None:
            raise UserError(
                f"--train-iters {self.train_iters} and --train-samples {self.train_samples} are two lengths of one run; give one"
            )
        if self.profile and self.profile_step_end <= self.profile_step_start:
            raise UserError(
                f"--profile-step-end {self.profile_step_end} must be after --profile-step-start {self.profile_step_start}"
            )
        if any(rank < 0 for rank in self.profile_ranks):
            raise UserError(f"--profile-ranks must be at least 0, got {' '.join(map(str, self.profile_ranks))}")


@dataclass(frozen=True)
class QuantizationConfig:
    """Matrix products of the student's layers in 8 or 4 bits, by Transformer Engine. Nothing of it without --fp8-format or --fp4-format."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply in FP8: e4m3 throughout, or hybrid, which has e5m2 for gradients. Needs --bf16 and --transformer-impl transformer_engine. Embedding, norms, attention, output head and loss stay as they are."""

    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None
    """How scales are chosen: one a tensor from its present maximum (tensorwise) or from those of earlier steps (delayed), or one for each block of 128 (blockwise) or 32 (mxfp8) values. Default: mxfp8 on GPUs of compute capability 10, else tensorwise."""

    fp8_amax_history_len: int = 1
    """Maxima that --fp8-recipe delayed remembers of each tensor."""

    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of the remembered maxima --fp8-recipe delayed scales by."""

    fp8_margin: int = 0
    """--fp8-recipe delayed leaves this many powers of two of room above the maximum."""

    fp8_param_gather: bool = False
    """Keep the layers' weights in FP8 alone (main parameters stay float32 in the distributed optimizer) and gather them so: half the weights' memory and traffic."""

    first_last_layers_bf16: bool = False
    """Leave the first --num-layers-at-start-in-bf16 and the last --num-layers-at-end-in-bf16 layers of the model out of FP8 and FP4."""

    num_layers_at_start_in_bf16: int = 1
    """Layers at the start that --first-last-layers-bf16 leaves in bfloat16."""

    num_layers_at_end_in_bf16: int = 1
    """Layers at the end that --first-last-layers-bf16 leaves in bfloat16."""

    fp4_format: Literal["e2m1"] | None = None
    """Multiply in FP4, which takes the place of --fp8-format. For GPUs of compute capability 10 and above."""

    fp4_recipe: Literal["nvfp4"] = "nvfp4"
    """How FP4's scales are chosen."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "fp8_amax_history_len")
        _at_least(self, 0, "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        _representable(self)
        if self.fp8_format is not None and self.fp4_format is not None:
            raise UserError(
                f"--fp8-format {self.fp8_format} and --fp4-format {self.fp4_format} are two precisions of the same products; give one"
            )
        for name in ("fp8_recipe", "fp8_param_gather"):
            if getattr(self, name) and self.fp8_format is None:
                raise UserError(f"{flag(name)} needs --fp8-format")
        if self.first_last_layers_bf16 and self.fp8_format is None and self.fp4_format is None:
            raise UserError("--first-last-layers-bf16 needs --fp8-format or --fp4-format")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise UserError(
                "--first-last-layers-bf16 cannot be combined with --fp8-recipe delayed, whose maxima are reduced over ranks once for all layers"
            )
        if self.fp8_recipe != "delayed" and (
            self.fp8_amax_history_len != 1 or self.fp8_amax_compute_algo != "most_recent" or self.fp8_margin
        ):
            raise UserError(
                "--fp8-amax-history-len, --fp8-amax-compute-algo and --fp8-margin belong to --fp8-recipe delayed, "
                f"got --fp8-recipe {self.fp8_recipe}"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and its clipping, with Megatron's meanings."""

    lr: float = 3e-4
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate that the decay ends at."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the learning rate after warm-up."""

    lr_decay_iters: int | None = None
    """Steps until --min-lr is reached; default: the whole run."""

    lr_decay_samples: int | None = None
    """The same in samples, for runs given in --train-samples."""

    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""

    lr_warmup_samples: int = 0
    """The same in samples."""

    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay's length, instead of a count."""

    lr_warmup_init: float = 0.0
    """Learning rate that warm-up starts at."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of WSD's final decay."""

    lr_wsd_decay_iters: int | None = None
    """Steps of WSD's final decay."""

    lr_wsd_decay_samples: int | None = None
    """The same in samples."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and norms have none."""

    start_weight_decay: float | None = None
    """Weight decay at the start under a --weight-decay-incr-style other than constant; default: --weight-decay."""

    end_weight_decay: float | None = None
    """Weight decay at the end under a --weight-decay-incr-style other than constant; default: --weight-decay."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay moves from start to end."""

    adam_beta1: float = 0.9
    """Decay of the gradient's average."""

    adam_beta2: float = 0.999
    """Decay of the squared gradient's average."""

    adam_eps: float = 1e-8
    """Added to the root of the squared gradient's average."""

    clip_grad: float = 1.0
    """Global gradient norm that gradients are scaled down to; 0: no clipping."""

    override_opt_param_scheduler: bool = False
    """On resume take the schedule from the flags, not from the checkpoint."""

    use_checkpoint_opt_param_scheduler: bool = False
    """On resume take the schedule from the checkpoint whatever the flags say."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            0,
            "lr",
            "min_lr",
            "lr_warmup_iters",
            "lr_warmup_samples",
            "lr_warmup_init",
            "weight_decay",
            "start_weight_decay",
            "end_weight_decay",
            "clip_grad",
        )
        _above_zero(self, "adam_eps")
        _at_least(self, 1, "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
        _from_zero_to_below_one(self, "adam_beta1", "adam_beta2")
        _within(self, 0.0, 1.0, "lr_warmup_fraction", "adam_eps")
        _representable(self)
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if self.lr_warmup_init > self.lr:
            raise UserError(f"--lr-warmup-init {self.lr_warmup_init} is above --lr {self.lr}")
        for name in ("weight_decay", "start_weight_decay", "end_weight_decay"):
            if self.lr * (getattr(self, name) or 0.0) >= 1.0:
                raise UserError(
                    f"--lr {self.lr} x {flag(name)} {getattr(self, name)} must be below 1, the share that a step takes from a weight"
                )
        if self.lr_warmup_fraction is not None and (self.lr_warmup_iters or self.lr_warmup_samples):
            raise UserError(
                f"--lr-warmup-fraction {self.lr_warmup_fraction} and --lr-warmup-iters {self.lr_warmup_iters} / "
                f"--lr-warmup-samples {self.lr_warmup_samples} are two lengths of one warm-up; give one"
            )
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None and self.lr_wsd_decay_samples is None:
            raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters (or --lr-wsd-decay-samples)")
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise UserError(
                "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other; give one"
            )


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, cut and masked how."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs, or weight prefix pairs: `0.7 web 0.3 code`. Without weights every window of every dataset is visited once an epoch."""

    valid_data_path: tuple[str, ...] = ()
    """Held-out data, in the same form as --data-path."""

    valid_share: float = 0.0
    """Share of each dataset's last windows that is held out from training when there is no --valid-data-path."""

    allow_valid_in_train: bool = False
    """Take a --valid-data-path that holds the data of a --data-path, in the same file, as a copy, or made of the same text."""

    eod_mask_loss: bool = False
    """No loss where the input token is the end-of-document id."""

    reset_position_ids: bool = False
    """Positions start again after each end-of-document id."""

    reset_attention_mask: bool = False
    """Tokens attend inside their own document alone."""

    verify_data: bool = False
    """Hash every byte of the data at start instead of a fixed sample of blocks. Data without a manifest has another fingerprint with it: give it from the start of a run or not at all."""

    allow_duplicate_inputs: bool = False
    """Take datasets that are the same data twice: one under two names, a copy, or two made of one file. Each then counts as one of its own."""

    def __post_init__(self) -> None:
        _within(self, 0.0, 0.5, "valid_share")
        _representable(self)
        if self.valid_share and self.valid_data_path:
            raise UserError(
                f"--valid-share {self.valid_share} and --valid-data-path {' '.join(self.valid_data_path)} both name held-out data; give one"
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """What turned text into ids."""

    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "ByteLevelTokenizer"] | None
    ) = None
    """Kind of tokenizer. None: the one named in the dataset's manifest or in the checkpoint; to turn text into ids it has to be given."""

    tokenizer_model: str | None = None
    """SentencePiece model file, or Hugging Face tokenizer.json."""

    vocab_file: str | None = None
    """GPT-2 vocabulary (encoder.json)."""

    merge_file: str | None = None
    """GPT-2 merges (vocab.bpe)."""

    eod_token: str | None = None
    """The token that ends documents, by its text. Default: the special token whose name or declaration says so; where several do, this is needed."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept, where, and what a resumed run takes from it."""

    save: str | None = None
    """Directory for checkpoints."""

    load: str | None = None
    """Directory to resume from: its latest checkpoint, or one iter_* directory. A --load without a checkpoint starts afresh when it equals --save, and is refused otherwise."""

    save_interval: int | None = None
    """Steps between checkpoints; the last step is always saved."""

    save_at: tuple[int, ...] = ()
    """Steps whose checkpoint is kept for good, whatever --keep-last says, and loads under any layout: an early teacher to score data with, say."""

    keep_last: int | None = None
    """Keep this many routine checkpoints and delete older ones; default: keep all."""

    async_save: bool = False
    """Write checkpoints from a background process while training goes on."""

    take_over_save: bool = False
    """Take --save away from a run that seems to be writing there. That run sees it within ten seconds and ends after its step."""

    overwrite_save: bool = False
    """Start into a --save that holds checkpoints which this run does not go on from. It replaces those whose steps it reaches and becomes the latest; the others stay, for --keep-last deletes a run's own alone."""

    dist_ckpt_optim_fully_reshardable: bool = False
    """Write routine checkpoints' optimizer state so that it loads under any layout, as the save at the run's last step always is. Slower: every data-parallel rank gathers its group's state in host memory, 12 bytes a parameter of its tp and pp share."""

    load_fallback: bool = False
    """When the newest checkpoint is damaged, report it and resume from the one before."""

    finetune: bool = False
    """Take the weights alone from --load: step 0, fresh optimizer, data from the start."""

    new_data: bool = False
    """Resume on other data than the checkpoint's: optimizer and step stay, the new data starts at its beginning, and the change is recorded."""

    no_load_optim: bool = False
    """Resume without the optimizer's state; the schedule goes on at the checkpoint's step."""

    no_load_rng: bool = False
    """Resume without the random state."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What a failed save (a full disk, say) does to the run. The last good checkpoint stands either way."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "save_interval", "keep_last")
        _representable(self)
        if self.save_interval is not None and self.save is None:
            raise UserError(f"--save-interval {self.save_interval} needs --save")
        for name in ("take_over_save", "overwrite_save"):
            if getattr(self, name) and self.save is None:
                raise UserError(f"{flag(name)} needs --save")
        if self.save_at and self.save is None:
            raise UserError(f"--save-at {' '.join(map(str, self.save_at))} needs --save")
        if any(step < 1 for step in self.save_at):
            raise UserError(f"--save-at must be at least 1, got {' '.join(map(str, self.save_at))}")
        if self.load is None:
            for name in ("finetune", "new_data", "no_load_optim", "no_load_rng", "load_fallback"):
                if getattr(self, name):
                    raise UserError(f"{flag(name)} needs --load")
        if self.finetune and self.new_data:
            raise UserError("--finetune starts at step 0 and --new-data keeps the step; give one")


@dataclass(frozen=True)
class LoggingConfig:
    """What a run says about itself."""

    log_interval: int = 1
    """Steps between log lines."""

    tensorboard_dir: str | None = None
    """TensorBoard directory; default: SAVE/tensorboard."""

    jsonl: str | None = None
    """File that gets one JSON object a step; default: SAVE/train.jsonl."""

    heartbeat_file: str | None = None
    """For a launcher: file that holds the present step and changes, at most every ten seconds, while steps go by. One that stands still longer than any evaluation or save takes means that the run hangs."""

    straggler_report_interval: int | None = None
    """Steps between reports of the rank that calculates, and the one that reads its data, more slowly than the others. Default: none."""

    wandb_project: str | None = None
    """Weights & Biases project (needs the wandb package)."""

    wandb_exp_name: str | None = None
    """Weights & Biases run name, any text. A resumed run of the same name continues it."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "log_interval", "straggler_report_interval")
        _representable(self)


@dataclass(frozen=True)
class SaltConfig:
    """The teacher, and how long and how strongly it teaches (SALT, arXiv 2410.18779). Nothing of it without --teacher-load or --stage1-selection."""

    teacher_load: str | None = None
    """Directory of the teacher's checkpoints (its latest is taken), or one iter_* directory. Its architecture, tokenizer and padding come from there. Default: no teacher, plain pretraining."""

    teacher_tensor_model_parallel_size: int = 1
    """Ranks that split each of the teacher's layers; independent of the student's."""

    teacher_pipeline_model_parallel_size: int = 1
    """Pipeline stages of the teacher. With the tensor-parallel size it must divide the ranks of one student replica (tp x cp x pp)."""

    teacher_micro_batch_size: int | None = None
    """Samples of one forward pass of the teacher: a multiple of --micro-batch-size, whose consecutive microbatches it merges. Default: --micro-batch-size."""

    teacher_fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply in FP8 in the teacher's layers (forward alone, where both formats are e4m3), and keep their weights in FP8 alone. Needs --bf16 and --transformer-impl transformer_engine. Default: bfloat16."""

    teacher_fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None
    """How the teacher's scales are chosen, see --fp8-recipe; delayed is refused for a teacher. Default: mxfp8 on GPUs of compute capability 10, else tensorwise."""

    teacher_fp8_max_kl: float = 0.01
    """Refuse an FP8 teacher whose distributions are further than this from its own in bfloat16: mean KL divergence, nats a token, at --kd-teacher-temperature or at 1, whichever is larger, on the run's first samples. In emulated FP8 trained models of 3 and 12 layers had 0.0002 to 0.0005 by every recipe; with one linear zeroed or at twice its scale, half of those of 12 layers had more than 0.006 and all of those of 3 more than 0.03. Larger models may need more room; the figure is told either way."""

    teacher_exchange_max_gib: float = 8.0
    """Refuse a run whose teacher hidden states would take more than this on a rank of the student's last stage in one step."""

    kd_weight: float = 0.667
    """Weight w of the teacher's soft labels in stage 1: the loss of a token is (1 - w) x cross entropy with the label + w x cross entropy with the teacher's distribution."""

    kd_teacher_temperature: float = 0.25
    """The teacher's distribution is softmax(logits / T); the student has no temperature, and no factor T^2 is applied. Below 1 it sharpens. The paper gives 0.25 and does not say which way it reads it; division sharpens, and did best in our runs."""

    kd_steps: int | None = None
    """Steps of stage 1, n_KD. From the next step on training is plain and the teacher is freed; as many as the run has, or more: it teaches to the end (reverse KD)."""

    kd_transition: Literal["step", "linear", "ratio"] = "step"
    """How w ends: at once, or over the last --kd-transition-steps of stage 1 linearly in w, or linearly in w / (1 - w)."""

    kd_transition_steps: int = 0
    """Length of a linear or ratio transition; it lies inside stage 1."""

    kd_stop: Literal["steps", "crossover"] = "steps"
    """What ends stage 1: --kd-steps alone, or also the student's held-out next-token accuracy passing the teacher's, asked at each evaluation (accuracy and not loss, because a sharpened teacher inflates the student's loss). After a crossover the transition still takes place."""

    kd_stop_margin: float = 0.0
    """How far, as a share of tokens, the student's accuracy must be above the teacher's for --kd-stop crossover. May be negative: stop that much before."""

    stage1_selection: str | None = None
    """What tools/select_data.py wrote: stage 1 draws from these samples alone (SALT_DS), each once before any comes again. With --kd-weight 0 no teacher is needed."""

    stage2_data: Literal["all", "unseen"] = "all"
    """What stage 2 draws from after a --stage1-selection: everything, from the beginning of an order of its own, or what stage 1 did not visit."""

    stage2_micro_batch_size: int | None = None
    """--micro-batch-size from the end of stage 1 on, when the teacher's memory is free. The global batch stays, so the mathematics does. Default: no change."""

    override_kd_schedule: bool = False
    """On resume inside stage 1 take the kd flags as they are now, where the checkpoint has others; the change is recorded in the checkpoint."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "teacher_tensor_model_parallel_size",
            "teacher_pipeline_model_parallel_size",
            "teacher_micro_batch_size",
            "kd_steps",
            "stage2_micro_batch_size",
        )
        _at_least(self, 0, "kd_transition_steps")
        _within(self, 0.0, 1.0, "kd_weight")
        _within(self, -1.0, 1.0, "kd_stop_margin")
        _above_zero(self, "kd_teacher_temperature", "teacher_exchange_max_gib", "teacher_fp8_max_kl")
        _within(self, 0.001, 1000.0, "kd_teacher_temperature")
        _representable(self)
        if self.teacher_fp8_recipe == "delayed":
            raise UserError(
                "--teacher-fp8-recipe delayed cannot be used: Transformer Engine updates delayed scales only where gradients are "
                "computed, so a teacher, which has none, would keep those that it started with; use tensorwise, blockwise or mxfp8"
            )
        if self.teacher_fp8_recipe is not None and self.teacher_fp8_format is None:
            raise UserError(f"--teacher-fp8-recipe {self.teacher_fp8_recipe} needs --teacher-fp8-format")
        if self.teacher_fp8_format is not None and self.teacher_load is None:
            raise UserError(f"--teacher-fp8-format {self.teacher_fp8_format} needs --teacher-load")
        if (
            self.teacher_load is None
            and self.kd_steps is not None
            and not (self.stage1_selection is not None and self.kd_weight == 0.0)
        ):
            raise UserError(
                f"--kd-steps {self.kd_steps} needs a teacher: give --teacher-load (or --stage1-selection with --kd-weight 0)"
            )
        if self.teacher_load is not None and self.kd_steps is None:
            raise UserError(f"--teacher-load {self.teacher_load} needs --kd-steps, the length of stage 1")
        if self.stage1_selection is not None and self.kd_steps is None:
            raise UserError(f"--stage1-selection {self.stage1_selection} needs --kd-steps, the length of stage 1")
        if self.kd_steps is None and self.stage2_micro_batch_size is not None:
            raise UserError(
                f"--stage2-micro-batch-size {self.stage2_micro_batch_size} needs a stage 1: give --teacher-load and --kd-steps"
            )
        if self.stage1_selection is None and self.stage2_data != "all":
            raise UserError(f"--stage2-data {self.stage2_data} needs --stage1-selection")
        if self.teacher_load is None and self.kd_stop == "crossover":
            raise UserError("--kd-stop crossover asks when the student passes its teacher: it needs --teacher-load")
        if self.kd_steps is not None and self.kd_transition_steps > self.kd_steps:
            raise UserError(
                f"--kd-transition-steps {self.kd_transition_steps} is longer than stage 1, --kd-steps {self.kd_steps}"
            )
        if (self.kd_transition == "step") != (self.kd_transition_steps == 0):
            raise UserError(
                f"--kd-transition {self.kd_transition} does not go with --kd-transition-steps {self.kd_transition_steps}: "
                "step takes none, linear and ratio take at least 1"
            )
        if self.kd_transition == "ratio" and self.kd_weight == 1.0:
            raise UserError("--kd-transition ratio needs --kd-weight below 1: at 1.0 the ratio w / (1 - w) is infinite")


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
