"""The metadata of a GGUF file as the config.json that transformers would have. Pure.

What our decoder cannot compute is refused by the key and its value. hugging_face/families.py makes the model of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_salt.convert.gguf.rope_factors import llama3_scaling
from megatron_salt.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that holds what each rotary frequency is divided by."""


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """What a file says of its model."""

    config: Mapping[str, Any]
    """As the config.json of transformers has it."""
    not_in_transformers: Mapping[str, Any]
    """The keys of `config` that transformers does not read from a GGUF file, although the file says them."""
    notes: tuple[str, ...]
    """What the user should know."""


class MetadataReader:
    """Reads the keys of one architecture, refuses what does not fit, and remembers which keys were read."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where, self._seen = metadata, where, set[str]()
        self.prefix = str(metadata.get("general.architecture", "")) + "."

    def refuse(self, key: str, why: str) -> UserError:
        """The error for a key whose value cannot be taken."""
        value = repr(self.metadata.get(key))
        return UserError(f"{self.where}: {key} is {value[:60]}: {why}")

    def optional(self, name: str, kind: type) -> Any:
        """The value of a key of the architecture; None where there is none. Raises UserError where it is of another kind."""
        key = self.prefix + name
        self._seen.add(key)
        value = self.metadata.get(key)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.refuse(key, f"expected one value of type {kind.__name__}")
        return value

    def get(self, name: str, kind: type) -> Any:
        """The value of a key of the architecture. Raises UserError where it is missing or of another kind."""
        value = self.optional(name, kind)
        if value is None:
            raise UserError(f"{self.where}: {self.prefix}{name} is missing")
        return value

    def size(self, name: str, default: int) -> int:
        """The value of a key that is a size or a count. Raises UserError where it is not from 1 on."""
        value = self.optional(name, int)
        if value is not None and value < 1:
            raise self.refuse(self.prefix + name, "expected a number from 1 on")
        return default if value is None else value

    def must_be(self, name: str, *allowed: Any) -> None:
        """Raise UserError where a key is there and has another value."""
        key = self.prefix + name
        self._seen.add(key)
        if key in self.metadata and self.metadata[key] not in allowed:
            raise self.refuse(key, f"this decoder computes only {' or '.join(map(repr, allowed))}")

    def unread(self) -> list[str]:
        """Keys of the architecture that nothing has read."""
        return [key for key in self.metadata if key.startswith(self.prefix) and key not in self._seen]


def config_of_metadata(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_divisors: np.ndarray | None, tied: bool, where: str
) -> FileConfig:
    """The config of a file. shapes: of its tensors. rope_divisors: the tensor `ROPE_FACTORS`. tied: the output weight is the embedding.

    where: names the file. Raises UserError.
    """
    reader = MetadataReader(metadata, where)
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _READERS:
        raise reader.refuse("general.architecture", f"known are {', '.join(_READERS)}")
    if metadata.get("general.type", "model") != "model":
        raise reader.refuse("general.type", "only whole models are read")
    if metadata.get("split.count", 0) not in (0, 1):
        raise reader.refuse("split.count", "join the files first, with llama-gguf-split --merge")
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{where}: token_embd.weight is missing")
    for key, allowed in _NEUTRAL.items():
        reader.must_be(key, *allowed)
    reader.must_be("vocab_size", embedding[0])
    if not 1 <= reader.get("block_count", int) <= len(shapes):
        raise reader.refuse(reader.prefix + "block_count", f"the file has {len(shapes)} tensors, and each layer has some")
    config = _READERS[name](reader, shapes)
    apart = {}
    if name != "gpt2":
        config["rope_parameters"] = _rope(reader, rope_divisors, config.get("head_dim"))
        if len(config["rope_parameters"]) > 2:
            apart["rope_parameters"] = config["rope_parameters"]
    apart |= {
        key: config[key] for key in ("attention_bias", "mlp_bias", "n_positions", "n_inner", "head_dim") if config.get(key)
    }
    unread = reader.unread()
    return FileConfig(
        config=config | {"vocab_size": embedding[0], "tie_word_embeddings": tied},
        not_in_transformers=apart,
        notes=(f"{where}: not read: {', '.join(unread)}",) if unread else (),
    )


def _sizes(reader: MetadataReader) -> dict[str, Any]:
    return {
        "hidden_size": reader.get("embedding_length", int),
        "intermediate_size": reader.get("feed_forward_length", int),
        "num_hidden_layers": reader.get("block_count", int),
        "num_attention_heads": reader.get("attention.head_count", int),
        "max_position_embeddings": reader.get("context_length", int),
    }


def _llama_like(architecture: str) -> Callable[[MetadataReader, Mapping[str, tuple[int, ...]]], dict[str, Any]]:
    """Llama and its relatives: RMSNorm, SwiGLU, rotary embeddings over the whole head."""

    def read(reader: MetadataReader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        config = _sizes(reader) | {"architectures": [architecture]}
        heads = config["num_attention_heads"]
        width = reader.size("attention.key_length", config["hidden_size"] // max(heads, 1))
        reader.must_be("attention.value_length", width)
        reader.must_be("rope.dimension_count", width)
        config |= {
            "num_key_value_heads": reader.size("attention.head_count_kv", heads),
            "head_dim": width,
            "rms_norm_eps": reader.get("attention.layer_norm_rms_epsilon", float),
        }
        window = reader.optional("attention.sliding_window", int)
        if window:
            config["sliding_window"] = window
        if architecture == "LlamaForCausalLM":
            config |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}
        elif window:
            config["use_sliding_window"] = True
        return config

    return read


def _gpt_neox(reader: MetadataReader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """GPT-NeoX. A file does not say which GELU: the exact one, as in Pythia and in GPT-NeoX-20B."""
    config = _sizes(reader)
    width = config["hidden_size"] // max(config["num_attention_heads"], 1)
    return config | {
        "architectures": ["GPTNeoXForCausalLM"],
        "layer_norm_eps": reader.get("attention.layer_norm_epsilon", float),
        "rotary_pct": reader.get("rope.dimension_count", int) / width,
        "use_parallel_residual": reader.get("use_parallel_residual", bool),
        "hidden_act": "gelu",
    }


def _gpt2(reader: MetadataReader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": reader.get("embedding_length", int),
        "n_inner": reader.get("feed_forward_length", int),
        "n_layer": reader.get("block_count", int),
        "n_head": reader.get("attention.head_count", int),
        "n_positions": reader.get("context_length", int),
        "layer_norm_epsilon": reader.get("attention.layer_norm_epsilon", float),
    }


def _rope(reader: MetadataReader, divisors: np.ndarray | None, width: int | None) -> dict[str, Any]:
    """The rope_parameters of transformers: rope_theta, rope_type, and the numbers of a scaling. width: of a head that is all rotated."""
    base = reader.optional("rope.freq_base", float)
    base = 10000.0 if base is None else base
    if not 0 < base < math.inf:
        raise reader.refuse(f"{reader.prefix}rope.freq_base", "expected a finite number above 0")
    rope: dict[str, Any] = {"rope_theta": base, "rope_type": "default"}
    reader.must_be("rope.scaling.type", "none", "linear")
    reader.must_be("rope.scaling.attn_factor", 1.0)
    reader.must_be("rope.scaling.yarn_log_multiplier", 0.0)
    reader.optional("rope.scaling.original_context_length", int)
    kind = reader.optional("rope.scaling.type", str)
    factor = reader.optional("rope.scaling.factor", float) or reader.optional("rope.scale_linear", float) or 1.0
    if kind != "none" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if divisors is None or bool((divisors == 1).all()):
        return rope
    if width is not None and divisors.shape != (width // 2,):
        raise UserError(
            f"{reader.where}: {ROPE_FACTORS} is {list(divisors.shape)}, and the head width {width} makes it [{width // 2}]"
        )
    scaling = llama3_scaling(divisors, rope["rope_theta"])
    if scaling is None or rope["rope_type"] == "linear":
        raise UserError(
            f"{reader.where}: {ROPE_FACTORS} scales rotary frequencies by {divisors.min():.4g} to {divisors.max():.4g}: not as Llama 3 does"
        )
    return rope | scaling | {"rope_type": "llama3"}


_READERS: Mapping[str, Callable[[MetadataReader, Mapping[str, tuple[int, ...]]], dict[str, Any]]] = {
    "llama": _llama_like("LlamaForCausalLM"),
    "qwen2": _llama_like("Qwen2ForCausalLM"),
    "qwen3": _llama_like("Qwen3ForCausalLM"),
    "gptneox": _gpt_neox,
    "gpt2": _gpt2,
}

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.temperature_length": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "tensor_data_layout": ("Meta AI original pth", "unknown", ""),
}
"""Keys that change what a model computes, and the values with which they change nothing."""
