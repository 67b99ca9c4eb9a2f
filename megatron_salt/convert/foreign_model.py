"""A model that another program trained, in our terms. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model that another program trained, in our terms."""

    architecture: str
    """The class in transformers, such as LlamaForCausalLM, or megatron-core's GPTModel."""
    model: ModelConfig
    vocabulary_size: int
    """Rows of its embedding: all of them are in its softmax, whatever its tokenizer has. Megatron's padding is left out."""
    context: int
    """Longest sequence that it may be given, in tokens."""
    notes: tuple[str, ...] = ()
    """What the user should know: unknown keys, a context that a sliding window shortens."""
