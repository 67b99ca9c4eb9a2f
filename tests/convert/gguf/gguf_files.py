"""Random models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from megatron_salt.convert.gguf.rope_factors import divisors_of
from megatron_salt.convert.hugging_face.families import model_of_config
from megatron_salt.convert.parts import parts_of

ROWS, CONTEXT, LAYERS, HEADS = 261, 128, 2, 8
"""More rows than the tokenizer's 258 ids: the converter pads the list of tokens."""
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GROUPED = dict(
    vocab_size=ROWS,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
)
_THETA = dict(rope_type="default", rope_theta=5000.0)
_ONE_FOR_ALL = {key: value for key, value in _GROUPED.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": dict(
        _GROUPED,
        architectures=["LlamaForCausalLM"],
        head_dim=64,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **_LLAMA3},
    ),
    "llama with biases": dict(
        _GROUPED,
        architectures=["LlamaForCausalLM"],
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=dict(_THETA, rope_type="linear", factor=3.0),
    ),
    "qwen2": dict(_GROUPED, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True, rope_parameters=_THETA),
    "qwen3": dict(_GROUPED, architectures=["Qwen3ForCausalLM"], head_dim=16, rope_parameters=_THETA),
    "gpt-neox": dict(
        _ONE_FOR_ALL, architectures=["GPTNeoXForCausalLM"], rotary_pct=0.25, layer_norm_eps=1e-5, rope_parameters=dict(_THETA)
    ),
    "gpt2": dict(
        architectures=["GPT2LMHeadModel"], vocab_size=ROWS, n_embd=64, n_inner=256, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT
    ),
}  # fmt: skip
"""Models as config.json describes them."""
_KINDS = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "GPTNeoXForCausalLM": gguf.MODEL_ARCH.GPTNEOX,
    "GPT2LMHeadModel": gguf.MODEL_ARCH.GPT2,
}


def random_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a model under their names in transformers."""
    generator = torch.Generator().manual_seed(0)
    foreign = model_of_config(config, "test")
    parts = parts_of(foreign.architecture, foreign.model, foreign.vocabulary_size, foreign.context)
    shapes = {name: shape for part in parts for name, shape in part.sources}
    return {
        name: torch.randn(shape, generator=generator) * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, shape in shapes.items()
    }


def stored_as(config: Mapping[str, Any], name: str, tensor: Tensor) -> np.ndarray:
    """A tensor of transformers as llama.cpp's converter stores it, entry by entry."""
    numbers = tensor.numpy()
    [architecture] = config["architectures"]
    if (architecture == "LlamaForCausalLM" and ".q_proj." in name) or (
        architecture == "LlamaForCausalLM" and ".k_proj." in name
    ):
        heads = config["num_attention_heads"] if ".q_proj." in name else config["num_key_value_heads"]
        width = len(numbers) // heads
        order = [
            head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in range(2)
        ]
        return np.ascontiguousarray(numbers[order])
    if architecture == "GPT2LMHeadModel" and ".h." in name and numbers.ndim == 2:
        return np.ascontiguousarray(numbers.T)
    if architecture == "GPTNeoXForCausalLM" and "query_key_value" in name:
        heads, width = config["num_attention_heads"], len(numbers) // (3 * config["num_attention_heads"])
        rows = [head * 3 * width + which * width + i for which in range(3) for head in range(heads) for i in range(width)]
        return np.ascontiguousarray(numbers[rows])
    return numbers


def write_gguf(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], kinds: Mapping[str, str] | None = None, **changes: Any
) -> dict[str, np.ndarray]:
    """Write a file. kinds: {end of a name in the file: type}, F32 otherwise. changes: of the metadata, `__` for a dot; None leaves out.

    Returns the tensors as they are stored, by their names in the file.
    """
    [architecture] = config["architectures"]
    kind = _KINDS[architecture]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    values = (
        _metadata(config, gguf.MODEL_ARCH_NAMES[kind]) | _tokenizer() | {k.replace("__", "."): v for k, v in changes.items()}
    )
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    names = gguf.get_tensor_name_map(kind, LAYERS)
    rope = config.get("rope_parameters", {})
    stored = {}
    for name, tensor in tensors.items():
        stem, _, end = name.rpartition(".")
        stored[f"{names.get_name(stem)}.{end}"] = stored_as(config, name, tensor)
    if rope.get("rope_type") == "llama3":
        stored["rope_freqs.weight"] = divisors_of(rope, config["head_dim"] // 2, rope["rope_theta"]).astype(np.float32)
    for name, numbers in stored.items():
        wanted = next((each for end, each in (kinds or {}).items() if name.endswith(end)), "F32")
        as_type = gguf.GGMLQuantizationType[wanted]
        writer.add_tensor(name, gguf.quants.quantize(numbers, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _metadata(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    get = config.get
    heads = get("num_attention_heads") or get("n_head")
    hidden = get("hidden_size") or get("n_embd")
    width = get("head_dim") or hidden // heads
    rope = get("rope_parameters", {})
    epsilon = "attention.layer_norm_rms_epsilon" if "rms_norm_eps" in config else "attention.layer_norm_epsilon"
    values = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": hidden,
        "feed_forward_length": get("intermediate_size") or get("n_inner"),
        "attention.head_count": heads,
        "attention.head_count_kv": get("num_key_value_heads"),
        epsilon: 1e-5,
        "rope.freq_base": rope.get("rope_theta"),
        "rope.dimension_count": None if name == "gpt2" else math.floor(width * get("rotary_pct", 1.0)),
        "rope.scaling.type": "linear" if rope.get("rope_type") == "linear" else None,
        "rope.scaling.factor": rope.get("factor") if rope.get("rope_type") == "linear" else None,
        "attention.key_length": width if "head_dim" in config else None,
        "attention.value_length": width if "head_dim" in config else None,
        "use_parallel_residual": True if name == "gptneox" else None,
    }
    return {f"{name}.{key}": value for key, value in values.items() if value is not None}


def _tokenizer() -> dict[str, Any]:
    """Bytes, the end of a document and one merge; then rows without a token."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "ab", *(f"[PAD{i}]" for i in range(258, ROWS))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 1] + [5] * (ROWS - 258),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.bos_token_id": 256,
    }
