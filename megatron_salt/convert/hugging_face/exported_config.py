"""A model of ours as the config.json of transformers. Pure. The other way: families.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_salt.config import ModelConfig
from megatron_salt.errors import UserError


def config_of_model(model: ModelConfig, vocabulary_size: int, context: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model of ours. Raises UserError, naming the flags, where no architecture in transformers computes it."""
    architecture = _architecture_of(model)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": vocabulary_size,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if architecture == "GPT2LMHeadModel":
        return config | {
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_width,
            "n_positions": model.max_position_embeddings or context,
            "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": _activation(model),
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    config |= {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_width,
        "max_position_embeddings": model.max_position_embeddings or context,
        "rope_theta": model.rotary_base,
        "rope_scaling": _rope_scaling(model),
    }
    if architecture == "GPTNeoXForCausalLM":
        return config | {
            "rotary_pct": model.rotary_percent,
            "rotary_emb_base": model.rotary_base,
            "layer_norm_eps": model.norm_epsilon,
            "hidden_act": _activation(model),
            "use_parallel_residual": model.parallel_residual,
            "attention_bias": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
    if architecture == "Starcoder2ForCausalLM":
        return config | {
            "num_key_value_heads": model.query_groups,
            "norm_epsilon": model.norm_epsilon,
            "hidden_act": _activation(model),
            "use_bias": not model.disable_bias_linear,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
        }
    if architecture == "StableLmForCausalLM":
        return config | {
            "num_key_value_heads": model.query_groups,
            "layer_norm_eps": model.norm_epsilon,
            "hidden_act": "silu",
            "partial_rotary_factor": model.rotary_percent,
            "use_qkv_bias": model.add_qkv_bias,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }
    config |= {
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_width,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    if architecture == "LlamaForCausalLM":
        biases = not model.disable_bias_linear
        config |= {"attention_bias": biases, "mlp_bias": biases}
    elif architecture == "Qwen3ForCausalLM":
        config |= {"attention_bias": False}
    return config


_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "GPT2LMHeadModel": "gpt2",
}


def _architecture_of(model: ModelConfig) -> str:
    """The class in transformers that computes this model. Raises UserError."""
    rope = model.position_embedding_type == "rope"
    same_width = model.head_width * model.num_attention_heads == model.hidden_size
    if rope and model.swiglu and model.normalization == "RMSNorm" and model.rotary_percent == 1 and not model.parallel_residual:
        if not model.add_qkv_bias and not model.qk_layernorm:
            return "LlamaForCausalLM"
        if model.disable_bias_linear and not (model.add_qkv_bias and model.qk_layernorm):
            if model.qk_layernorm:
                return "Qwen3ForCausalLM"
            if same_width:
                return "Qwen2ForCausalLM"
            raise UserError(
                f"--add-qkv-bias with --kv-channels {model.kv_channels} x --num-attention-heads {model.num_attention_heads} other than "
                f"--hidden-size {model.hidden_size}: Qwen2 in transformers has no such model"
            )
    plain = model.normalization == "LayerNorm" and same_width and not (model.squared_relu or model.qk_layernorm)
    multi_head = model.query_groups == model.num_attention_heads
    gated = plain and model.swiglu
    without_gate = plain and not model.swiglu
    all_biases = not model.disable_bias_linear
    if gated and rope and not all_biases and not model.parallel_residual:
        return "StableLmForCausalLM"
    if without_gate and all_biases and multi_head:
        if rope:
            return "GPTNeoXForCausalLM"
        if model.position_embedding_type == "learned_absolute" and not model.parallel_residual:
            return "GPT2LMHeadModel"
    if (
        without_gate
        and rope
        and model.rotary_percent == 1
        and not model.parallel_residual
        and (all_biases or not model.add_qkv_bias)
    ):
        return "Starcoder2ForCausalLM"
    raise UserError(
        f"no architecture in transformers computes this model: {', '.join(_described(model))}. Llama, Qwen2 and Qwen3 have rope, RMSNorm "
        "and --swiglu; StableLM rope, LayerNorm and --swiglu; GPT-NeoX and Starcoder2 rope, LayerNorm and GELU or ReLU; GPT-2 learned "
        "positions, LayerNorm, GELU or ReLU, and biases"
    )


def _described(model: ModelConfig) -> Iterable[str]:
    """The flags that decide the architecture."""
    yield f"--position-embedding-type {model.position_embedding_type}"
    yield f"--normalization {model.normalization}"
    switches = (
        "swiglu",
        "squared_relu",
        "relu",
        "gelu_tanh",
        "disable_bias_linear",
        "add_qkv_bias",
        "qk_layernorm",
        "parallel_residual",
    )
    yield from ("--" + name.replace("_", "-") for name in switches if getattr(model, name))
    if model.query_groups != model.num_attention_heads:
        yield f"--num-query-groups {model.query_groups}"
    if model.rotary_percent != 1:
        yield f"--rotary-percent {model.rotary_percent:g}"


def _activation(model: ModelConfig) -> str:
    """The activation of an MLP without a gate, as transformers names it."""
    return "relu" if model.relu else "gelu_new" if model.gelu_tanh else "gelu"


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": model.rope_scaling_low_freq_factor,
            "high_freq_factor": model.rope_scaling_high_freq_factor,
            "original_max_position_embeddings": model.rope_scaling_original_context,
        }
    return scaling
