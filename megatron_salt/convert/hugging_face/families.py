"""Models of Hugging Face's transformers as our ModelConfig. Pure: it reads the JSON of a config.json. The other way: exported_config.py.

What our decoder cannot compute is refused by the key and its value. A key that says nothing of the arithmetic is passed over, and a key
that this module does not know is returned, so that the user hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_salt.config import ModelConfig
from megatron_salt.convert.config_reader import LARGEST, ConfigReader
from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.convert.hugging_face.unsupported import LACKING
from megatron_salt.errors import UserError


def model_of_config(config: Mapping[str, Any], where: str) -> ForeignModel:
    """The model that a config.json describes. `where` names the file. Raises UserError."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if architecture is None or architecture not in _READERS:
        what = None if architecture is None else LACKING.get(architecture)
        lacking = "" if what is None else f": this decoder has no {what}"
        raise UserError(f"{where}: architectures is {named!r}{lacking}; known are {', '.join(_READERS)}")
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantization_config is set: quantised weights are not read; give the original weights")
    reader = ConfigReader(config, where, silent=_SILENT)
    try:
        foreign = _READERS[architecture](reader)
    except UserError as error:
        raise reader.in_file(error) from None
    unread = reader.unread()
    notes = (f"{where}: not read: {', '.join(unread)}",) if unread else ()
    return ForeignModel(
        architecture=architecture,
        model=foreign.model,
        vocabulary_size=foreign.vocabulary_size,
        context=foreign.context,
        notes=(*foreign.notes, *notes),
    )


def _llama_like(reader: ConfigReader, architecture: str, qkv_bias: bool = False, qk_norm: bool = False) -> ForeignModel:
    """Llama and its relatives: RMSNorm, SwiGLU, rotary embeddings."""
    reader.must_be("hidden_act", "silu", default="silu")
    heads, hidden = reader.get("num_attention_heads", int), reader.get("hidden_size", int)
    attention_bias = False if qkv_bias else reader.get("attention_bias", bool, False)
    mlp_bias = reader.get("mlp_bias", bool, False)
    if attention_bias != mlp_bias:
        raise reader.refuse("attention_bias", f"mlp_bias is {mlp_bias}; either all linear layers have biases, or none has")
    context, notes = _context(
        reader,
        reader.get("use_sliding_window", bool, False) if architecture.startswith("Qwen") else True,
        default_window=4096 if architecture == "MistralForCausalLM" else None,
    )
    reader.optional(
        "original_max_position_embeddings", int
    )  # Phi3 has it beside rope_scaling, where it counts for longrope alone
    width = reader.optional("head_dim", int)
    model = ModelConfig(
        **_sizes(reader),
        num_query_groups=reader.optional("num_key_value_heads", int),
        kv_channels=None if width is None or width * heads == hidden else width,
        position_embedding_type="rope",
        normalization="RMSNorm",
        norm_epsilon=reader.get("rms_norm_eps", float, 1e-5 if architecture == "Phi3ForCausalLM" else 1e-6),
        qk_layernorm=qk_norm,
        swiglu=True,
        disable_bias_linear=not mlp_bias,
        add_qkv_bias=qkv_bias,
        untie_embeddings_and_output_weights=not reader.get("tie_word_embeddings", bool, False),
        init_method_std=reader.get("initializer_range", float, 0.02),
        **_rotary(reader, None),
    )
    return ForeignModel(
        architecture=architecture, model=model, vocabulary_size=reader.get("vocab_size", int), context=context, notes=notes
    )


def _context(reader: ConfigReader, uses_window: bool, default_window: int | None = None) -> tuple[int, tuple[str, ...]]:
    """The longest context, and what to tell the user. Within a sliding window the model computes as if it had none.

    default_window: of a model whose config does not say.
    """
    context = reader.get("max_position_embeddings", int)
    window = reader.optional("sliding_window", int) if reader.given("sliding_window") else default_window
    layer_kinds = reader.optional("layer_types", list) or []
    reader.optional("max_window_layers", int)
    if uses_window and window is not None and window < context:
        return window, (f"sliding_window {window} is shorter than max_position_embeddings {context}: the context is {window}",)
    if any(kind != "full_attention" for kind in layer_kinds):
        raise reader.refuse("layer_types", "this decoder computes only full_attention")
    return context, ()


def _sizes(reader: ConfigReader) -> dict[str, Any]:
    """Fields of ModelConfig for the sizes that most families call by the same names."""
    return {
        "num_layers": reader.get("num_hidden_layers", int),
        "hidden_size": reader.get("hidden_size", int),
        "ffn_hidden_size": reader.get("intermediate_size", int),
        "num_attention_heads": reader.get("num_attention_heads", int),
    }


def _activation(reader: ConfigReader, key: str, default: str) -> dict[str, Any]:
    """Fields of ModelConfig for the activation of an MLP without a gate."""
    act = reader.must_be(key, "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", default=default)
    return {"gelu_tanh": act in ("gelu_new", "gelu_pytorch_tanh"), "relu": act == "relu"}


def _stablelm(reader: ConfigReader) -> ForeignModel:
    """LayerNorm, SwiGLU, rotary embeddings on a part of each head; biases of queries, keys and values alone, or none."""
    reader.must_be("hidden_act", "silu", default="silu")
    reader.must_be("use_parallel_residual", False, default=False)
    reader.must_be("qk_layernorm", False, default=False)
    model = ModelConfig(
        **_sizes(reader),
        num_query_groups=reader.optional("num_key_value_heads", int),
        position_embedding_type="rope",
        norm_epsilon=reader.get("layer_norm_eps", float, 1e-5),
        swiglu=True,
        disable_bias_linear=True,
        add_qkv_bias=reader.get("use_qkv_bias", bool, False),
        untie_embeddings_and_output_weights=not reader.get("tie_word_embeddings", bool, False),
        init_method_std=reader.get("initializer_range", float, 0.02),
        **_rotary(reader, 0.25),
    )
    return ForeignModel(
        architecture="StableLmForCausalLM",
        model=model,
        vocabulary_size=reader.get("vocab_size", int),
        context=reader.get("max_position_embeddings", int),
    )


def _starcoder2(reader: ConfigReader) -> ForeignModel:
    """LayerNorm, GELU, rotary embeddings, grouped queries."""
    context, notes = _context(reader, True)
    model = ModelConfig(
        **_sizes(reader),
        num_query_groups=reader.optional("num_key_value_heads", int),
        position_embedding_type="rope",
        norm_epsilon=reader.get("norm_epsilon", float, 1e-5),
        disable_bias_linear=not reader.get("use_bias", bool, True),
        untie_embeddings_and_output_weights=not reader.get("tie_word_embeddings", bool, True),
        init_method_std=reader.get("initializer_range", float, 0.02),
        **_activation(reader, "hidden_act", "gelu_pytorch_tanh"),
        **_rotary(reader, None),
    )
    return ForeignModel(
        architecture="Starcoder2ForCausalLM",
        model=model,
        vocabulary_size=reader.get("vocab_size", int),
        context=context,
        notes=notes,
    )


def _opt(reader: ConfigReader) -> ForeignModel:
    """Learned positions, LayerNorm, ReLU, biases. OPT-350m has its norms elsewhere, and is refused."""
    for key, only in (
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("layer_norm_elementwise_affine", True),
    ):
        reader.must_be(key, only, default=only)
    hidden, positions = reader.get("hidden_size", int), reader.get("max_position_embeddings", int)
    if reader.optional("word_embed_proj_dim", int) not in (None, hidden):
        raise reader.refuse("word_embed_proj_dim", f"this decoder's embedding is as wide as hidden_size, {hidden}")
    model = ModelConfig(
        num_layers=reader.get("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=reader.get("ffn_dim", int),
        num_attention_heads=reader.get("num_attention_heads", int),
        max_position_embeddings=positions,
        disable_bias_linear=not reader.get("enable_bias", bool, True),
        untie_embeddings_and_output_weights=not reader.get("tie_word_embeddings", bool, True),
        init_method_std=reader.get("init_std", float, 0.02),
        **_activation(reader, "activation_function", "relu"),
    )
    return ForeignModel(
        architecture="OPTForCausalLM", model=model, vocabulary_size=reader.get("vocab_size", int), context=positions
    )


def _gpt_neox(reader: ConfigReader) -> ForeignModel:
    reader.must_be("attention_bias", True, default=True)
    model = ModelConfig(
        **_sizes(reader),
        position_embedding_type="rope",
        normalization="LayerNorm",
        norm_epsilon=reader.get("layer_norm_eps", float, 1e-5),
        parallel_residual=reader.get("use_parallel_residual", bool, True),
        untie_embeddings_and_output_weights=not reader.get("tie_word_embeddings", bool, False),
        init_method_std=reader.get("initializer_range", float, 0.02),
        **_activation(reader, "hidden_act", "gelu"),
        **_rotary(reader, reader.get("rotary_pct", float, 0.25)),
    )
    return ForeignModel(
        architecture="GPTNeoXForCausalLM",
        model=model,
        vocabulary_size=reader.get("vocab_size", int),
        context=reader.get("max_position_embeddings", int),
    )


def _gpt2(reader: ConfigReader) -> ForeignModel:
    reader.must_be("scale_attn_weights", True, default=True)
    reader.must_be("scale_attn_by_inverse_layer_idx", False, default=False)
    reader.must_be("add_cross_attention", False, default=False)
    hidden, positions = reader.get("n_embd", int), reader.get("n_positions", int)
    model = ModelConfig(
        num_layers=reader.get("n_layer", int),
        hidden_size=hidden,
        ffn_hidden_size=reader.optional("n_inner", int) or 4 * hidden,
        num_attention_heads=reader.get("n_head", int),
        max_position_embeddings=positions,
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        norm_epsilon=reader.get("layer_norm_epsilon", float, 1e-5),
        untie_embeddings_and_output_weights=not reader.get("tie_word_embeddings", bool, True),
        init_method_std=reader.get("initializer_range", float, 0.02),
        **_activation(reader, "activation_function", "gelu_new"),
    )
    return ForeignModel(
        architecture="GPT2LMHeadModel", model=model, vocabulary_size=reader.get("vocab_size", int), context=positions
    )


def _rotary(reader: ConfigReader, percent: float | None) -> dict[str, Any]:
    """Fields of ModelConfig for rotary embeddings. transformers 5 writes `rope_parameters`, earlier releases `rope_theta` and
    `rope_scaling` (GPT-NeoX: `rotary_emb_base`)."""
    key = "rope_parameters" if reader.optional("rope_parameters", dict) else "rope_scaling"
    rope = dict(reader.optional(key, dict) or {})

    def number(name: str) -> float | None:
        value = rope.get(name)
        if value is not None and type(value) not in (int, float):
            raise reader.refuse(key, f"{name} is no number")
        return None if value is None else float(value)

    def first(*values: float | None) -> float | None:
        return next((value for value in values if value is not None), None)

    base = first(number("rope_theta"), reader.optional("rope_theta", float), reader.optional("rotary_emb_base", float), 10000.0)
    share = first(number("partial_rotary_factor"), reader.optional("partial_rotary_factor", float), percent)
    fields: dict[str, Any] = {"rotary_base": base} | ({} if share is None else {"rotary_percent": share})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3"):
        raise reader.refuse(key, "this decoder scales rotary frequencies by rope_type linear or llama3")
    names = {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_scaling_low_freq_factor",
        "high_freq_factor": "rope_scaling_high_freq_factor",
        "original_max_position_embeddings": "rope_scaling_original_context",
    }
    needed = list(names) if kind == "llama3" else ["factor"]
    found = {name: number(name) for name in needed}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise reader.refuse(key, f"it lacks {', '.join(missing)}")
    fields |= {"rope_scaling": kind} | {names[name]: value for name, value in found.items()}
    if kind == "llama3":
        original = found["original_max_position_embeddings"]
        if original is None or original != round(original) or not 1 <= original <= LARGEST:
            raise reader.refuse(key, f"original_max_position_embeddings is no number from 1 to {LARGEST}")
        fields["rope_scaling_original_context"] = round(original)
    return fields


_READERS: Mapping[str, Callable[[ConfigReader], ForeignModel]] = {
    "LlamaForCausalLM": lambda reader: _llama_like(reader, "LlamaForCausalLM"),
    "MistralForCausalLM": lambda reader: _llama_like(reader, "MistralForCausalLM"),
    "Qwen2ForCausalLM": lambda reader: _llama_like(reader, "Qwen2ForCausalLM", qkv_bias=True),
    "Qwen3ForCausalLM": lambda reader: _llama_like(reader, "Qwen3ForCausalLM", qk_norm=True),
    "Phi3ForCausalLM": lambda reader: _llama_like(reader, "Phi3ForCausalLM"),
    "StableLmForCausalLM": _stablelm,
    "Starcoder2ForCausalLM": _starcoder2,
    "GPTNeoXForCausalLM": _gpt_neox,
    "GPT2LMHeadModel": _gpt2,
    "OPTForCausalLM": _opt,
}

_SILENT = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "pretraining_tp", "tokenizer_class", "attention_dropout", "hidden_dropout", "classifier_dropout",
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "reorder_and_upcast_attn", "_attn_implementation_autoset",
    "is_decoder", "is_encoder_decoder", "unk_token_id", "is_llama_config", "rope_interleaved", "transformers.js_config",
    "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "residual_dropout", "embedding_dropout", "dropout", "layerdrop",
}  # fmt: skip
"""Keys that say nothing of the forward pass of a pretrained model."""
