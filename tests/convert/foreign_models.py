"""Random models of transformers, at shapes that hide no trap: python -m tests.convert.foreign_models DIRECTORY [NAME ...]

A program of its own: the CPU seam patches torch in ways that transformers does not expect.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

IDS = 257
"""Bytes and the end of a document: the ids of the tokenizer that lies beside every model."""
ROWS = 261
"""Rows of the embedding: more than ids, as Qwen2 and Pythia have, and no multiple of anything."""
CONTEXT = 128

_SHAPE = dict(
    vocab_size=ROWS,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    max_position_embeddings=CONTEXT,
)
_GROUPED = dict(_SHAPE, num_key_value_heads=2)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5000.0,
    factor=3.0,
    low_freq_factor=1.5,
    high_freq_factor=5.0,
    original_max_position_embeddings=40,
)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", dict(_GROUPED, head_dim=16, rope_parameters=_LLAMA3)),
    "llama with biases": (
        "Llama",
        dict(
            _GROUPED,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="linear", rope_theta=5000.0, factor=3.0),
        ),
    ),
    "mistral": ("Mistral", dict(_GROUPED, head_dim=16, sliding_window=64)),
    "qwen2": ("Qwen2", dict(_GROUPED, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "qwen3": ("Qwen3", dict(_GROUPED, head_dim=16)),
    "phi3": ("Phi3", dict(_GROUPED, pad_token_id=0)),
    "stablelm": ("StableLm", dict(_GROUPED, use_qkv_bias=True)),
    "starcoder2": ("Starcoder2", dict(_GROUPED, hidden_act="gelu_pytorch_tanh")),
    "opt": (
        "OPT",
        dict(
            vocab_size=ROWS, hidden_size=64, ffn_dim=96, num_hidden_layers=4, num_attention_heads=8,
            max_position_embeddings=CONTEXT, word_embed_proj_dim=64, pad_token_id=0,
        ),
    ),
    "gpt-neox": ("GPTNeoX", dict(_SHAPE, rotary_pct=0.25)),
    "gpt-neox in sequence": ("GPTNeoX", dict(_SHAPE, rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu_new")),
    "gpt2": ("GPT2", dict(vocab_size=ROWS, n_embd=64, n_layer=4, n_head=8, n_positions=CONTEXT)),
    "teacher": ("Llama", dict(_GROUPED, vocab_size=IDS)),  # as many rows as ids
}  # fmt: skip
LEAVES_AS = {"mistral": "LlamaForCausalLM", "phi3": "LlamaForCausalLM", "opt": "GPT2LMHeadModel"}
"""Models that are exported under another architecture, which computes the same. Mistral's tensors keep their names."""
SHARDED = ("llama", "gpt-neox")
"""Models whose weights lie in several files."""


def make(directory: Path, *names: str) -> None:
    """A folder for each model, or for those of these names."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    for name in names or MODELS:
        family, sizes = MODELS[name]
        head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
        config = getattr(transformers, f"{family}Config")(**sizes, eos_token_id=IDS - 1, bos_token_id=IDS - 1)
        model = getattr(transformers, head)(config).float()
        with torch.no_grad():  # biases and norms would start at 0 and 1, and hide what becomes of them
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
        model.save_pretrained(directory / name, max_shard_size="100KB" if name in SHARDED else "5GB")
        tokenizer.save(str(directory / name / "tokenizer.json"))
        (directory / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


if __name__ == "__main__":
    make(Path(sys.argv[1]), *sys.argv[2:])
