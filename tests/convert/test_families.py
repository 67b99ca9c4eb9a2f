"""config.json and ModelConfig: one becomes the other and back; what the decoder cannot compute is refused by key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_salt.config import ModelConfig
from megatron_salt.convert.hugging_face.exported_config import config_of_model
from megatron_salt.convert.hugging_face.families import model_of_config
from megatron_salt.convert.hugging_face.unsupported import LACKING
from megatron_salt.errors import UserError

LLAMA = ModelConfig(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=2, position_embedding_type="rope",
    normalization="RMSNorm", swiglu=True, disable_bias_linear=True, untie_embeddings_and_output_weights=True, norm_epsilon=1e-6,
)  # fmt: skip
GPT2 = ModelConfig(
    num_layers=4, hidden_size=64, ffn_hidden_size=256, num_attention_heads=8, max_position_embeddings=128, gelu_tanh=True
)
NEOX = replace(
    GPT2,
    position_embedding_type="rope",
    rotary_percent=0.25,
    parallel_residual=True,
    gelu_tanh=False,
    max_position_embeddings=None,
)
KNOWN: dict[str, tuple[str, ModelConfig]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama 3": (
        "LlamaForCausalLM",
        replace(
            LLAMA, rope_scaling="llama3", rope_scaling_factor=32.0, rope_scaling_low_freq_factor=1.5,
            rope_scaling_high_freq_factor=5.0, rope_scaling_original_context=100, kv_channels=16,
        ),
    ),
    "linear": ("LlamaForCausalLM", replace(LLAMA, rope_scaling="linear", rope_scaling_factor=4.0, rotary_base=5e5)),
    "with biases": ("LlamaForCausalLM", replace(LLAMA, disable_bias_linear=False)),
    "qwen2": ("Qwen2ForCausalLM", replace(LLAMA, add_qkv_bias=True)),
    "qwen3": ("Qwen3ForCausalLM", replace(LLAMA, qk_layernorm=True, kv_channels=16)),
    "gpt-neox": ("GPTNeoXForCausalLM", NEOX),
    "gpt-neox in sequence": ("GPTNeoXForCausalLM", replace(NEOX, parallel_residual=False, gelu_tanh=True)),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 with relu": ("GPT2LMHeadModel", replace(GPT2, gelu_tanh=False, relu=True)),
    "stablelm": (
        "StableLmForCausalLM",
        replace(LLAMA, normalization="LayerNorm", norm_epsilon=1e-5, add_qkv_bias=True, rotary_percent=0.25),
    ),
    "starcoder2": ("Starcoder2ForCausalLM", replace(NEOX, rotary_percent=1.0, parallel_residual=False, num_query_groups=2, gelu_tanh=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_becomes_a_config_and_the_same_model_again(name: str) -> None:
    architecture, model = KNOWN[name]
    config = config_of_model(model, 261, 128, "bfloat16")
    assert config["architectures"] == [architecture]
    again = model_of_config(config, "config.json")
    assert again.notes == () and (again.vocabulary_size, again.context) == (261, 128)
    assert again.model == replace(model, num_query_groups=model.num_query_groups if architecture[0] in "LQS" else None)


@pytest.mark.parametrize(
    "change",
    [
        dict(squared_relu=True, swiglu=False),
        dict(position_embedding_type="none"),
        dict(normalization="LayerNorm", qk_layernorm=True),
        dict(normalization="LayerNorm", disable_bias_linear=False),
        dict(normalization="LayerNorm", swiglu=False, rotary_percent=0.5),
        dict(rotary_percent=0.5),
        dict(parallel_residual=True),
        dict(add_qkv_bias=True, qk_layernorm=True),
        dict(add_qkv_bias=True, kv_channels=16),
    ],
)
def test_a_model_that_transformers_does_not_know_is_refused_by_flag(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        config_of_model(replace(LLAMA, **change), 261, 128, "bfloat16")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("llama", {"attention_bias": True}, "attention_bias is True: mlp_bias is False"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling .* linear or llama3"),
        ("llama 3", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "it lacks low_freq_factor, high_freq_factor"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0: expected a number from 1 to 2147483647"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"num_key_value_heads": 3}, "config.json: .*--num-query-groups 3"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True"),
        ("starcoder2", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        (
            "llama",
            {"architectures": ["Gemma2ForCausalLM"]},
            "this decoder has no scaled embeddings, .* capped logits; known are Llama",
        ),
        ("gpt-neox", {"attention_bias": False}, "attention_bias is False"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_key(name: str, change: dict[str, Any], words: str) -> None:
    config = config_of_model(KNOWN[name][1], 261, 128, "float32") | change
    with pytest.raises(UserError, match=words):
        model_of_config(config, "config.json")


def test_a_sliding_window_shortens_the_context_where_it_is_used() -> None:
    qwen2 = config_of_model(KNOWN["qwen2"][1], 261, 128, "float32") | {"sliding_window": 64}
    assert model_of_config(qwen2, "x").context == 128
    used = model_of_config(qwen2 | {"use_sliding_window": True}, "x")
    assert used.context == 64 and "sliding_window 64" in used.notes[0]
    mistral = config_of_model(LLAMA, 261, 128, "float32") | {"architectures": ["MistralForCausalLM"], "sliding_window": 64}
    assert model_of_config(mistral, "x").context == 64


def test_a_key_that_is_missing_means_what_it_means_to_transformers() -> None:
    config = config_of_model(LLAMA, 261, 32768, "float32") | {"architectures": ["MistralForCausalLM"]}
    assert model_of_config(config, "x").context == 4096
    assert model_of_config(config | {"sliding_window": None}, "x").context == 32768
    del config["rms_norm_eps"]
    assert model_of_config(config, "x").model.norm_epsilon == 1e-6
    assert model_of_config(config | {"architectures": ["Phi3ForCausalLM"]}, "x").model.norm_epsilon == 1e-5


def test_a_key_that_is_not_known_is_told() -> None:
    foreign = model_of_config(
        config_of_model(LLAMA, 261, 128, "float32") | {"logit_scale": 2.0, "nothing": None}, "config.json"
    )
    assert foreign.notes == ("config.json: not read: logit_scale",)


OPT = dict(
    architectures=["OPTForCausalLM"], vocab_size=261, hidden_size=64, ffn_dim=96, num_hidden_layers=4, num_attention_heads=8,
    max_position_embeddings=128, word_embed_proj_dim=64, do_layer_norm_before=True, activation_function="relu",
)  # fmt: skip


def test_opt_has_learned_positions_relu_and_biases() -> None:
    foreign = model_of_config(OPT, "config.json")
    assert foreign.model == replace(GPT2, gelu_tanh=False, relu=True, ffn_hidden_size=96)
    assert (foreign.vocabulary_size, foreign.context, foreign.notes) == (261, 128, ())


@pytest.mark.parametrize(
    "change", [dict(do_layer_norm_before=False), dict(word_embed_proj_dim=32), dict(activation_function="silu")]
)
def test_an_opt_of_another_build_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        model_of_config(OPT | change, "config.json")


def test_every_architecture_is_taken_or_refused_and_not_both() -> None:
    for architecture in LACKING:
        with pytest.raises(UserError, match="this decoder has no "):
            model_of_config({"architectures": [architecture]}, "config.json")


@pytest.mark.parametrize(
    "scaling", [{}, {"rope_type": "default"}, {"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4}]
)
def test_both_ways_to_write_rotary_embeddings_mean_the_same(scaling: dict[str, Any]) -> None:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters; torch_dtype became dtype."""
    base = config_of_model(LLAMA, 261, 128, "float16")
    rope = {key: value for key, value in base.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    old = model_of_config(rope | {"torch_dtype": "float16", "rope_theta": 5e5, "rope_scaling": scaling or None}, "config.json")
    new = model_of_config(rope | {"dtype": "float16", "rope_parameters": scaling | {"rope_theta": 500000}}, "config.json")
    scaled = dict(rope_scaling="linear", rope_scaling_factor=4.0) if "factor" in scaling else {}
    assert old == new and old.notes == () and old.model == replace(LLAMA, rotary_base=5e5, **scaled)  # type: ignore[arg-type]
