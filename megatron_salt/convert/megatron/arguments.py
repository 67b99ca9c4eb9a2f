"""Models of Megatron-LM and Megatron-Bridge as our ModelConfig. Pure. The other way: exported_arguments.py.

Megatron-LM describes a model in its args, Megatron-Bridge in the provider of its run_config.yaml; most names are those of megatron-core's
TransformerConfig. Both name many hundred things. Read is what decides the arithmetic; what our decoder cannot compute is refused by name
and value, and a tensor that our decoder has no place for is refused where weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from megatron_salt.config import ModelConfig
from megatron_salt.convert.config_reader import ConfigReader
from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.errors import UserError

ARCHITECTURE = "GPTModel"
"""megatron-core's class."""
CORE_ROPE_FACTOR = 8.0
"""By which megatron-core stretches rotary frequencies where a program does not say."""

_MUST_BE_OFF = (
    "num_experts", "num_moe_experts", "multi_latent_attention", "mtp_num_layers", "experimental_attention_variant",
    "hybrid_layer_pattern", "hybrid_override_pattern", "hybrid_attention_ratio", "hybrid_mlp_ratio", "is_hybrid_model",
    "heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json", "heterogeneous_block_specs", "spec",
    "linear_attention_freq", "apply_layernorm_1p", "layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm",
    "qk_l2_norm", "attention_output_gate", "rotary_interleaved", "no_rope_freq", "softmax_scale", "quick_geglu", "openai_gelu",
    "glu_linear_offset", "activation_func_clamp_value", "use_mup", "enable_mhc_connections", "mrope_section",
)  # fmt: skip
"""What changes the arithmetic into something that our decoder does not compute. None, False and 0 mean: not used."""
_OUR_PROVIDERS = re.compile(r"^(GPTModelProvider|GPTModelConfig|(Llama|CodeLlama|Qwen|Mistral)\w*ModelProvider\w*)$")
_OTHER_PROVIDERS = re.compile(r"Llama4|Next|MoE|VL|Omni|Audio|ASR")
_DEFAULT_SPECS = (
    "default_layer_spec",
    "transformer_engine_layer_spec",
    "transformer_engine_full_layer_spec",
    "local_layer_spec",
)
_CORE_ACTIVATIONS = {"silu": "swiglu", "gelu": "gelu", "fast_gelu": "gelu_tanh", "squared_relu": "squared_relu"}


def _refuse_used(reader: ConfigReader, *names: str) -> None:
    """Raise UserError where one of the names has a value other than None, False and 0."""
    for name in names:
        value = reader.value(name)
        if any(value) if isinstance(value, list | tuple) else value:
            raise reader.refuse(name, "this decoder does not compute it")


def _target(reader: ConfigReader, name: str) -> str:
    """The last word of a class or function that YAML names as {_target_: ...}; "" where there is none."""
    value = reader.value(name)
    named = value.get("_target_") if isinstance(value, dict) else value
    return named.split(".")[-1] if isinstance(named, str) else ""


def model_of_args(args: Mapping[str, Any], vocabulary_size: int, where: str) -> ForeignModel:
    """The model that Megatron-LM's args describe. `where` names them. Raises UserError."""
    reader = ConfigReader(args, where, show=str)
    biases = reader.get("add_bias_linear", bool, True)
    if reader.get("swiglu", bool, False):
        activation = "swiglu"
    elif reader.get("squared_relu", bool, False):
        activation = "squared_relu"
    else:
        activation = _gelu(reader, fused=reader.get("bias_gelu_fusion", bool, True) and biases)
    positions = "rope" if reader.get("use_rotary_position_embeddings", bool, False) else _positions(reader)
    if positions != "rope" and not reader.get("add_position_embedding", bool, True):
        raise reader.refuse(
            "add_position_embedding", f"position_embedding_type is {positions}; give a checkpoint that names none"
        )
    scaled = positions == "rope" and reader.get("use_rope_scaling", bool, False)
    if scaled and reader.get("rope_scaling_factor", float, CORE_ROPE_FACTOR) != CORE_ROPE_FACTOR:
        raise reader.refuse(
            "rope_scaling_factor",
            f"Megatron-LM's training computes with {CORE_ROPE_FACTOR:g} whatever this says, other programs do not: "
            "which of the two the weights need cannot be known",
        )
    if positions == "rope" and reader.optional("rotary_seq_len_interpolation_factor", int) not in (None, 1):
        raise reader.refuse(
            "rotary_seq_len_interpolation_factor", "some releases of Megatron-LM compute with it, others do not"
        )
    return _model(
        reader,
        vocabulary_size,
        activation=activation,
        positions=positions,
        scaling=("llama3", CORE_ROPE_FACTOR) if scaled else ("none", CORE_ROPE_FACTOR),
        grouped=reader.get("group_query_attention", bool, False),
        tied=not reader.get("untie_embeddings_and_output_weights", bool, False),
        context_name="max_position_embeddings",
        epsilon_name="layernorm_epsilon" if "layernorm_epsilon" in args else "norm_epsilon",
    )


def model_of_provider(provider: Mapping[str, Any], vocabulary_size: int, where: str) -> ForeignModel:
    """The model in Megatron-Bridge's run_config.yaml, with the file's own words. `where` names the file. Raises UserError."""
    inner = provider.get("transformer")
    reader = ConfigReader({**inner, **provider} if isinstance(inner, dict) else provider, where, show=str)
    kind = _target(reader, "_target_")
    if not _OUR_PROVIDERS.match(kind) or _OTHER_PROVIDERS.search(kind):
        raise reader.refuse(
            "_target_", "known are GPTModelProvider and GPTModelConfig, and the providers of Llama, Mistral and Qwen"
        )
    if _target(reader, "transformer_layer_spec") not in ("", *_DEFAULT_SPECS):
        raise reader.refuse("transformer_layer_spec", f"known are {', '.join(_DEFAULT_SPECS)}")
    activation = _CORE_ACTIVATIONS.get(_target(reader, "activation_func"))
    if activation is None or (activation == "swiglu") != reader.get("gated_linear_unit", bool, False):
        raise reader.refuse(
            "activation_func", f"gated_linear_unit is {provider.get('gated_linear_unit')}: not computed by this decoder"
        )
    if activation == "gelu":
        fused = reader.get("bias_activation_fusion", bool, False)
        activation = _gelu(reader, fused=fused and reader.get("add_bias_linear", bool, True))
    positions = _positions(reader)
    scaling = ("none", CORE_ROPE_FACTOR)
    stretch = reader.optional("seq_len_interpolation_factor", float)
    if positions == "rope" and reader.get("rope_scaling", bool, False):
        if stretch not in (None, 1.0):
            raise reader.refuse("seq_len_interpolation_factor", "rope_scaling is True; this decoder computes one of the two")
        scaling = ("llama3", reader.get("rope_scaling_factor", float))
    elif positions == "rope" and stretch not in (None, 1.0):
        scaling = ("linear", stretch)
    return _model(
        reader,
        vocabulary_size,
        activation=activation,
        positions=positions,
        scaling=scaling,
        grouped=True,
        tied=reader.get("share_embeddings_and_output_weights", bool, "GPTModelConfig" not in kind),
        context_name="seq_length",
        epsilon_name="layernorm_epsilon",
    )


def _gelu(reader: ConfigReader, fused: bool) -> str:
    """Which GELU: megatron-core's kernel that adds the bias too computes the approximation by tanh, torch's function does not."""
    _refuse_used(reader, "use_te_activation_func")
    return "gelu_tanh" if fused else "gelu"


def _positions(reader: ConfigReader) -> str:
    kind = reader.get("position_embedding_type", str, "learned_absolute")
    if kind not in ("learned_absolute", "rope", "none"):
        raise reader.refuse("position_embedding_type", "this decoder computes only learned_absolute, rope and none")
    return kind


def _model(
    reader: ConfigReader, vocabulary_size: int, *, activation: str, positions: str, scaling: tuple[str, float], grouped: bool, tied: bool,
    context_name: str, epsilon_name: str,
) -> ForeignModel:  # fmt: skip
    """The model, of what both programs call by the same names, and of what they do not."""
    _refuse_used(reader, *_MUST_BE_OFF)
    if reader.get("softmax_type", str, "vanilla") != "vanilla":
        raise reader.refuse("softmax_type", "this decoder computes only vanilla")
    hidden, heads = reader.get("hidden_size", int), reader.get("num_attention_heads", int)
    biases, width = reader.get("add_bias_linear", bool, True), reader.optional("kv_channels", int)
    groups = reader.optional("num_query_groups", int) if grouped else None
    normalization = reader.get("normalization", str, "LayerNorm")
    if normalization not in ("LayerNorm", "RMSNorm"):
        raise reader.refuse("normalization", "this decoder computes only LayerNorm and RMSNorm")
    reader.optional("seq_length", int)  # of the training; a file in which it is no length is damaged
    context, notes = _context(reader, reader.get(context_name, int))
    kind: Literal["learned_absolute", "rope", "none"] = positions  # type: ignore[assignment]  # `_positions` has looked
    try:
        model = ModelConfig(
            num_layers=reader.get("num_layers", int),
            hidden_size=hidden,
            ffn_hidden_size=reader.get("ffn_hidden_size", int),
            num_attention_heads=heads,
            num_query_groups=None if groups == heads else groups,
            kv_channels=None if width is None or width * heads == hidden else width,
            max_position_embeddings=reader.get(context_name, int) if positions == "learned_absolute" else None,
            position_embedding_type=kind,
            rotary_base=reader.get("rotary_base", float, 10000.0),
            rotary_percent=reader.get("rotary_percent", float, 1.0),
            rope_scaling=scaling[0],  # type: ignore[arg-type]  # none, linear or llama3
            rope_scaling_factor=scaling[1],
            normalization=normalization,  # looked at above
            norm_epsilon=reader.get(epsilon_name, float, 1e-5),
            qk_layernorm=reader.get("qk_layernorm", bool, False),
            swiglu=activation == "swiglu",
            gelu_tanh=activation == "gelu_tanh",
            squared_relu=activation == "squared_relu",
            disable_bias_linear=not biases,
            add_qkv_bias=not biases and reader.get("add_qkv_bias", bool, False),
            untie_embeddings_and_output_weights=not tied,
            init_method_std=reader.get("init_method_std", float, 0.02),
        )
    except UserError as error:
        raise reader.in_file(error) from None
    return ForeignModel(architecture=ARCHITECTURE, model=model, vocabulary_size=vocabulary_size, context=context, notes=notes)


def _context(reader: ConfigReader, longest: int) -> tuple[int, tuple[str, ...]]:
    """The longest sequence that the model may be given: a sliding window shortens it. And what to tell of it."""
    window = reader.value("window_size")
    if window is None:
        return longest, ()
    if not isinstance(window, list | tuple) or len(window) != 2 or any(type(side) is not int or side < -1 for side in window):
        raise reader.refuse("window_size", "expected two numbers from -1 on")
    if window[0] < 0 or window[0] + 1 >= longest:
        return longest, ()
    return window[0] + 1, (
        f"window_size {list(window)} is shorter than the context of {longest}: the context is {window[0] + 1}",
    )
