"""Megatron-LM's args and Megatron-Bridge's provider as a ModelConfig, and back; what the decoder cannot compute is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_salt.config import ModelConfig
from megatron_salt.convert.megatron.arguments import model_of_args, model_of_provider
from megatron_salt.convert.megatron.exported_arguments import args_of_model, flags_to_give
from megatron_salt.errors import UserError
from tests.convert.megatron.megatron_models import CONTEXT, GPT2, IDS, LLAMA, args_of, provider_of

PLAIN = replace(LLAMA, rope_scaling="none", qk_layernorm=False, add_qkv_bias=False, kv_channels=None, num_query_groups=None)
KNOWN = {
    "llama 3": LLAMA,
    "llama": PLAIN,
    "gpt2": replace(GPT2, num_query_groups=None),
    "exact gelu": replace(GPT2, gelu_tanh=False, position_embedding_type="none", max_position_embeddings=None),
    "gelu without biases": replace(PLAIN, swiglu=False),
    "squared relu": replace(PLAIN, swiglu=False, squared_relu=True, rotary_base=10000.5, init_method_std=0.01),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_becomes_args_and_the_same_model_again(name: str) -> None:
    foreign = model_of_args(args_of_model(KNOWN[name], IDS, CONTEXT), IDS, "args")
    assert foreign.model == KNOWN[name]
    assert (foreign.architecture, foreign.vocabulary_size, foreign.context) == ("GPTModel", IDS, CONTEXT)


def test_flags_that_a_checkpoint_does_not_give_to_megatron_lm_are_told() -> None:
    assert flags_to_give(LLAMA)[:2] == ["--norm-epsilon", "1e-06"]
    assert {"--qk-layernorm", "--use-rope-scaling"} <= set(flags_to_give(LLAMA))
    assert "--no-bias-gelu-fusion" in flags_to_give(KNOWN["exact gelu"])
    assert "--no-bias-gelu-fusion" not in {*flags_to_give(GPT2), *flags_to_give(LLAMA), *flags_to_give(KNOWN["squared relu"])}


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(parallel_residual=True), "--parallel-residual"),
        (dict(swiglu=False, relu=True), "--relu: Megatron-LM has no such activation"),
        (dict(swiglu=False, gelu_tanh=True), "--gelu-tanh with --disable-bias-linear"),
        (dict(rope_scaling="linear"), "--rope-scaling linear with factor 8"),
        (dict(rope_scaling_factor=32.0), "--rope-scaling-factor 32: Megatron-LM computes with 8"),
        (dict(rope_scaling_original_context=4096), "--rope-scaling-original-context 4096"),
    ],
)
def test_a_model_that_megatron_lm_does_not_have_is_refused_by_flag(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        args_of_model(replace(LLAMA, **change), IDS, CONTEXT)


@pytest.mark.parametrize(
    "model, args, expected",
    [
        (GPT2, dict(bias_gelu_fusion=False), dict(gelu_tanh=False)),  # only the fused kernel computes tanh
        (GPT2, dict(group_query_attention=False, num_query_groups=1), dict(num_query_groups=None)),  # the flag's default is 1
        (LLAMA, dict(use_rotary_position_embeddings=True, position_embedding_type="learned_absolute"), {}),  # its old name
        (LLAMA, dict(use_rope_scaling=False, rope_scaling_factor=32.0), dict(rope_scaling="none")),
        (LLAMA, dict(swiglu=False, squared_relu=True), dict(swiglu=False, squared_relu=True)),
        (LLAMA, dict(swiglu=False), dict(swiglu=False)),  # without biases there is no fused kernel
        (LLAMA, dict(num_experts=0, no_rope_freq=[0, 0, 0], softmax_type="vanilla", window_size=(-1, 0)), {}),
    ],
)
def test_args_are_read_as_megatron_lm_reads_them(model: ModelConfig, args: dict[str, Any], expected: dict[str, Any]) -> None:
    assert model_of_args(vars(args_of(model)) | args, IDS, "x").model == replace(model, **expected)


def test_newer_args_call_the_epsilon_by_megatron_cores_name() -> None:
    args = vars(args_of(LLAMA))
    del args["norm_epsilon"]
    assert model_of_args(args | {"layernorm_epsilon": 1e-7}, IDS, "x").model.norm_epsilon == 1e-7


def test_a_window_shortens_the_context() -> None:
    foreign = model_of_args(vars(args_of(LLAMA)) | {"window_size": (31, 0)}, IDS, "x")
    assert foreign.context == 32 and "window_size [31, 0]" in foreign.notes[0]
    for wide in ((63, 0), (-1, 0), (-1, -1)):
        assert model_of_args(vars(args_of(LLAMA)) | {"window_size": wide}, IDS, "x").context == CONTEXT


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(num_experts=8), "num_experts is 8: this decoder does not compute it"),
        (dict(multi_latent_attention=True), "multi_latent_attention is True"),
        (dict(mtp_num_layers=1), "mtp_num_layers is 1"),
        (dict(apply_layernorm_1p=True), "apply_layernorm_1p is True"),
        (dict(layernorm_zero_centered_gamma=True), "layernorm_zero_centered_gamma is True"),
        (dict(spec=["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]), "spec is .'megatron"),
        (dict(no_rope_freq=[0, 1, 0]), "no_rope_freq"),
        (dict(rotary_interleaved=True), "rotary_interleaved is True"),
        (dict(quick_geglu=True), "quick_geglu is True"),
        (dict(softmax_type="learnable"), "softmax_type is learnable"),
        (dict(position_embedding_type="yarn"), "position_embedding_type is yarn: .* learned_absolute, rope and none"),
        (dict(rope_scaling_factor=32.0), "rope_scaling_factor is 32.0: Megatron-LM's training computes with 8"),
        (dict(rotary_seq_len_interpolation_factor=2), "rotary_seq_len_interpolation_factor is 2"),
        (dict(normalization="L2Norm"), "normalization is L2Norm"),
        (dict(swiglu=False, use_te_activation_func=True), "use_te_activation_func is True"),
        (dict(position_embedding_type="learned_absolute", add_position_embedding=False), "add_position_embedding is False"),
        (dict(num_layers=None), "num_layers is missing"),
        (dict(hidden_size="64"), "hidden_size is 64: expected a value of type int"),
        (dict(num_layers=0), "num_layers is 0: expected a number from 1 to 2147483647"),
        (dict(max_position_embeddings=10**12), "max_position_embeddings is 1000000000000: expected a number from 1 to"),
        (dict(seq_length=-1), "seq_length is -1: expected a number from 1 to"),
        (dict(window_size=[1]), r"window_size is \[1\]: expected two numbers from -1 on"),
        (dict(window_size=[1, 0, 0]), r"window_size is \[1, 0, 0\]: expected two numbers"),
        (dict(window_size=[31, None]), r"window_size is \[31, None\]: expected two numbers"),
        (dict(window_size=[-2, 0]), r"window_size is \[-2, 0\]: expected two numbers"),
        (dict(num_query_groups=3), "^args: --num-attention-heads 8 is not divisible by --num-query-groups 3"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model_of_args(vars(args_of(LLAMA)) | change, IDS, "args")


def function(name: str) -> dict[str, Any]:
    """A function in Megatron-Bridge's YAML."""
    return {"_target_": name, "_call_": False}


GELU = dict(gated_linear_unit=False, activation_func=function("torch._C._nn.gelu"), add_bias_linear=True)
WITH_BIASES = dict(swiglu=False, disable_bias_linear=False, add_qkv_bias=False)


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(rope_scaling_factor=32.0), dict(rope_scaling_factor=32.0)),  # here it counts
        (dict(rope_scaling=False, seq_len_interpolation_factor=4.0), dict(rope_scaling="linear", rope_scaling_factor=4.0)),
        (GELU, dict(WITH_BIASES, gelu_tanh=True)),
        (GELU | dict(bias_activation_fusion=False), dict(WITH_BIASES, gelu_tanh=False)),
        (
            GELU | dict(activation_func=function("megatron.core.activations.fast_gelu"), bias_activation_fusion=False),
            dict(WITH_BIASES, gelu_tanh=True),
        ),
        (
            dict(gated_linear_unit=False, activation_func=function("megatron.core.activations.squared_relu")),
            dict(swiglu=False, squared_relu=True),
        ),
        (dict(_target_="megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B"), {}),
        (dict(share_embeddings_and_output_weights=True), dict(untie_embeddings_and_output_weights=False)),
    ],
)
def test_a_provider_is_read_as_megatron_bridge_reads_it(change: dict[str, Any], expected: dict[str, Any]) -> None:
    assert model_of_provider(provider_of(LLAMA) | change, IDS, "x").model == replace(LLAMA, **expected)


def test_a_builders_config_has_the_transformers_fields_inside() -> None:
    outer = {"_target_", "seq_length", "position_embedding_type", "rotary_base", "rotary_percent", "rope_scaling", "vocab_size"}
    outer |= {"rope_scaling_factor", "share_embeddings_and_output_weights", "seq_len_interpolation_factor"}
    provider = provider_of(LLAMA)
    inner = {name: provider.pop(name) for name in list(provider) if name not in outer}
    provider |= {"_target_": "megatron.bridge.models.gpt.gpt_builder.GPTModelConfig", "transformer": inner}
    assert model_of_provider(provider, IDS, "x").model == LLAMA


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(_target_="megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"),
            "_target_ is megatron.bridge.models.gemma",
        ),
        (dict(_target_="megatron.bridge.models.llama.llama_provider.Llama4ModelProvider"), "_target_ is .*Llama4"),
        (dict(num_moe_experts=8), "num_moe_experts is 8"),
        (dict(transformer_layer_spec=function("my.own_spec")), "transformer_layer_spec is .*own_spec"),
        (dict(activation_func=function("torch.nn.functional.relu"), gated_linear_unit=False), "activation_func is .*relu"),
        (dict(gated_linear_unit=False), "activation_func is .*silu.*: gated_linear_unit is False"),
        (dict(seq_len_interpolation_factor=4.0), "seq_len_interpolation_factor is 4.0: rope_scaling is True"),
    ],
)
def test_a_provider_that_the_decoder_cannot_compute_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model_of_provider(provider_of(LLAMA) | change, IDS, "run_config.yaml")
