"""A model of ours as Megatron-LM's args. Pure. The other way: arguments.py."""

from __future__ import annotations

from typing import Any

from megatron_salt.config import ModelConfig
from megatron_salt.convert.megatron.arguments import CORE_ROPE_FACTOR
from megatron_salt.errors import UserError

_CORE_LLAMA3 = {
    "rope_scaling_factor": CORE_ROPE_FACTOR,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_original_context": 8192,
}
"""The numbers that Megatron-LM's training computes with under --use-rope-scaling."""


def args_of_model(model: ModelConfig, vocabulary_size: int, context: int) -> dict[str, Any]:
    """The args of a model of ours, for Megatron-LM's --use-checkpoint-args and for our own import.

    Raises UserError, naming the flags, where Megatron-LM has no such model.
    """
    _refuse_unknown(model)
    longest = model.max_position_embeddings or context
    biases = not model.disable_bias_linear
    base = int(model.rotary_base) if model.rotary_base == int(model.rotary_base) else model.rotary_base
    gelu = not (model.swiglu or model.squared_relu)
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_width,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.query_groups != model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_width,
        "seq_length": context,
        "max_position_embeddings": longest if model.position_embedding_type == "learned_absolute" else context,
        "position_embedding_type": model.position_embedding_type,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": model.position_embedding_type == "rope",
        "rotary_base": base,
        "rotary_percent": model.rotary_percent,
        "rotary_interleaved": False,
        "use_rope_scaling": model.rope_scaling == "llama3",
        "rope_scaling_factor": CORE_ROPE_FACTOR,
        "normalization": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "layernorm_epsilon": model.norm_epsilon,
        "apply_layernorm_1p": False,
        "qk_layernorm": model.qk_layernorm,
        "swiglu": model.swiglu,
        "squared_relu": model.squared_relu,
        "bias_gelu_fusion": gelu and model.gelu_tanh,
        "add_bias_linear": biases,
        "add_qkv_bias": biases or model.add_qkv_bias,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "init_method_std": model.init_method_std,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "padded_vocab_size": model.padded_vocabulary_size(vocabulary_size),
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def flags_to_give(model: ModelConfig) -> list[str]:
    """Flags of Megatron-LM that decide the arithmetic, and that --use-checkpoint-args does not take from a checkpoint."""
    flags = [
        "--norm-epsilon",
        f"{model.norm_epsilon:g}",
        "--make-vocab-size-divisible-by",
        str(model.make_vocab_size_divisible_by),
    ]
    switches = {
        "--qk-layernorm": model.qk_layernorm,
        "--use-rope-scaling": model.rope_scaling == "llama3",
        "--no-bias-gelu-fusion": not (model.swiglu or model.squared_relu or model.gelu_tanh),
    }
    return [*flags, *(flag for flag, given in switches.items() if given)]


def _refuse_unknown(model: ModelConfig) -> None:
    """Raise UserError, naming the flags, where Megatron-LM's decoder does not compute this model."""
    if model.parallel_residual:
        raise UserError("--parallel-residual: Megatron-LM has no such layer")
    if model.relu:
        raise UserError("--relu: Megatron-LM has no such activation")
    if model.gelu_tanh and model.disable_bias_linear:
        raise UserError("--gelu-tanh with --disable-bias-linear: Megatron-LM computes GELU by tanh only where it adds a bias")
    if model.rope_scaling == "linear":
        raise UserError(
            f"--rope-scaling linear with factor {model.rope_scaling_factor:g}: only some releases of Megatron-LM compute it"
        )
    if model.rope_scaling == "llama3":
        for name, value in _CORE_LLAMA3.items():
            if getattr(model, name) != value:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{flag} {getattr(model, name):g}: Megatron-LM computes with {value:g} under --use-rope-scaling"
                )
