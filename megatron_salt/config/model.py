"""Architecture of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import above_zero, at_least, from_zero_to_below_one, representable, within
from megatron_salt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of the decoder. Every checkpoint records it; a checkpoint of another architecture is refused."""

    num_layers: int = 12
    """Transformer layers in the whole model."""

    hidden_size: int = 768
    """Width of the residual stream."""

    ffn_hidden_size: int | None = None
    """Width of the MLP.
    Default: 4 x hidden size; with --swiglu 8/3 x hidden size, rounded up to a multiple of 64."""

    num_attention_heads: int = 12
    """Query heads."""

    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention). Default: as many as query heads."""

    kv_channels: int | None = None
    """Width of one head. Default: hidden size / query heads."""

    max_position_embeddings: int | None = None
    """Longest context: the rows of the table of learned positions. Default: --seq-length."""

    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """How the model encodes positions: a learned table, rotary embeddings (rope), or not at all."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    rotary_percent: float = 1.0
    """Share of each head's channels that are rotated, from 0 to 1."""

    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary frequencies are stretched for a longer context: not at all; all of them (linear); or the low ones alone (llama3)."""

    rope_scaling_factor: float = 8.0
    """Under --rope-scaling: by how much the stretched frequencies are divided."""

    rope_scaling_low_freq_factor: float = 1.0
    """Under --rope-scaling llama3: waves that fit fewer times than this into the original context are stretched by the whole factor."""

    rope_scaling_high_freq_factor: float = 4.0
    """Under --rope-scaling llama3: waves that fit more often than this into the original context are not stretched."""

    rope_scaling_original_context: int = 8192
    """Under --rope-scaling llama3: the context before it was stretched, in tokens."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of norm before attention, before the MLP and at the end of the model."""

    norm_epsilon: float = 1e-5
    """Added to the variance inside a norm, so that it is never divided by 0."""

    qk_layernorm: bool = False
    """Normalise the queries and keys of each head before attention."""

    swiglu: bool = False
    """Use a gated MLP with SiLU. Without --swiglu and --squared-relu the MLP uses GELU."""

    gelu_tanh: bool = False
    """Use GELU's approximation by tanh, as GPT-2 does, in the place of exact GELU."""

    squared_relu: bool = False
    """Use squared ReLU in the MLP."""

    relu: bool = False
    """Use ReLU in the MLP, as OPT does."""

    disable_bias_linear: bool = False
    """Leave out the biases of linear layers."""

    add_qkv_bias: bool = False
    """Under --disable-bias-linear: keep the biases of queries, keys and values, as Qwen2 does."""

    parallel_residual: bool = False
    """Attention and MLP both read the layer's input, each through its own norm; both are added to it. As in GPT-NeoX and Pythia."""

    untie_embeddings_and_output_weights: bool = False
    """Give the output layer a weight of its own. Default: it shares the word embeddings."""

    init_method_std: float = 0.02
    """Standard deviation of initial weights.
    Output projections are scaled down by sqrt(2 x layers)."""

    hidden_dropout: float = 0.0
    """Dropout after the embedding, attention and the MLP."""

    attention_dropout: float = 0.0
    """Dropout of attention weights."""

    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this, for every tensor-parallel size, so that checkpoints reshard.
    Must be a multiple of the tensor-parallel size. Padded ids take no part in the loss."""

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "rope_scaling_original_context",
            "make_vocab_size_divisible_by",
        )
        above_zero(
            self, "rotary_base", "rope_scaling_factor", "rope_scaling_low_freq_factor", "norm_epsilon", "init_method_std"
        )
        within(self, 0.0, 1.0, "rotary_percent", "norm_epsilon", "init_method_std")
        from_zero_to_below_one(self, "hidden_dropout", "attention_dropout")
        representable(self)
        activations = [
            flag
            for flag, given in (
                ("--swiglu", self.swiglu),
                ("--squared-relu", self.squared_relu),
                ("--relu", self.relu),
                ("--gelu-tanh", self.gelu_tanh),
            )
            if given
        ]
        if len(activations) > 1:
            raise UserError(f"{' and '.join(activations[:2])} name two different activations; give one")
        if self.rope_scaling != "none" and self.position_embedding_type != "rope":
            raise UserError(
                f"--rope-scaling {self.rope_scaling} needs --position-embedding-type rope, got {self.position_embedding_type}"
            )
        if self.rope_scaling_high_freq_factor <= self.rope_scaling_low_freq_factor:
            raise UserError(
                f"--rope-scaling-high-freq-factor {self.rope_scaling_high_freq_factor:g} must be above "
                f"--rope-scaling-low-freq-factor {self.rope_scaling_low_freq_factor:g}"
            )
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
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        """Channels of the MLP's inner layer."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64 if self.swiglu else 4 * self.hidden_size

    def padded_vocabulary_size(self, vocabulary_size: int) -> int:
        """Rows of the embedding weight for a tokenizer with `vocabulary_size` ids."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocabulary_size // multiple) * multiple
