"""How the tensors of a model in transformers, or in megatron-core's GPTModel, become ours, and back, bit for bit.

Ours are megatron-core's (`tensor_part.py`). Tensors of all layers have one key in a checkpoint, with an axis of layers in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_salt.config import ModelConfig
from megatron_salt.convert.tensor_part import (
    Part,
    Shape,
    copied,
    grouped,
    join_qkv,
    one_under_the_other,
    split_qkv,
    stacked,
    transposed,
    vocabulary_weight,
)
from megatron_salt.errors import UserError


def parts_of(architecture: str, model: ModelConfig, vocabulary_size: int, context: int) -> Iterator[Part]:
    """Every tensor of a model: first the embedding, then layer by layer, then norm and output layer.

    architecture: the class in transformers, or GPTModel. context: rows of a table of learned positions.
    """
    if architecture == "GPT2LMHeadModel":
        return _gpt2(model, vocabulary_size, context)
    if architecture == "GPTNeoXForCausalLM":
        return _gpt_neox(model, vocabulary_size)
    if architecture == "OPTForCausalLM":
        return _opt(model, vocabulary_size, context)
    if architecture == "GPTModel":
        return _gpt_model(model, vocabulary_size, context)
    return _llama(architecture, model, vocabulary_size)


def refuse_missing(
    parts: Sequence[Part], num_layers: int, sizes: Mapping[str, tuple[Shape, torch.dtype]], directory: Path
) -> None:
    """Raise UserError where a checkpoint lacks a tensor of its model, or has it in another shape.

    sizes: of the tensors that the checkpoint in `directory` holds.
    """
    for part in parts:
        wanted = part.shape if part.layer is None else (num_layers, *part.shape)
        saved = sizes[part.key][0] if part.key in sizes else None
        if saved != wanted:
            there = "missing" if saved is None else str(list(saved))
            raise UserError(f"{directory}: {part.key} is {there}, and its state.json makes it {list(wanted)}")


# ---- families ----------------------------------------------------------------------------------------------------------

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_POSITIONS = "embedding.position_embeddings.weight"
_QKV, _PROJECTION = "decoder.layers.self_attention.linear_qkv", "decoder.layers.self_attention.linear_proj"
_FC1, _FC2 = "decoder.layers.mlp.linear_fc1", "decoder.layers.mlp.linear_fc2"
_FINAL = "decoder.final_layernorm"


def _llama(architecture: str, model: ModelConfig, vocabulary_size: int) -> Iterator[Part]:
    """Llama, Mistral, Qwen2, Qwen3, Phi3, StableLM and Starcoder2."""
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_width
    of_norm = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    of_linear = ("weight",) if model.disable_bias_linear else ("weight", "bias")
    yield vocabulary_weight(EMBEDDING, "model.embed_tokens.weight", model, vocabulary_size)
    for layer in range(model.num_layers):
        attention = f"model.layers.{layer}.self_attn."
        for key, norm in ((_QKV, "input_layernorm"), (_FC1, "post_attention_layernorm")):
            for kind in of_norm:
                yield copied(f"{key}.layer_norm_{kind}", layer, f"model.layers.{layer}.{norm}.{kind}", (hidden,))
        for kind in ("weight", "bias") if model.add_qkv_bias else of_linear:
            columns = (hidden,) if kind == "weight" else ()
            if architecture == "Phi3ForCausalLM":
                yield one_under_the_other(f"{_QKV}.{kind}", layer, f"{attention}qkv_proj.{kind}", model, columns)
            else:
                yield grouped(f"{_QKV}.{kind}", layer, [f"{attention}{name}_proj.{kind}" for name in "qkv"], model, columns)
        if model.qk_layernorm:
            for name in "qk":
                key = f"decoder.layers.self_attention.{name}_layernorm.weight"
                yield copied(key, layer, f"{attention}{name}_norm.weight", (model.head_width,))
        for kind in of_linear:
            yield copied(
                f"{_PROJECTION}.{kind}", layer, f"{attention}o_proj.{kind}", (hidden, heads)[: 2 if kind == "weight" else 1]
            )
            yield from _llama_mlp(architecture, model, layer, kind)
    for kind in of_norm:
        yield copied(f"{_FINAL}.{kind}", None, f"model.norm.{kind}", (hidden,))
    if model.untie_embeddings_and_output_weights:
        yield vocabulary_weight(OUTPUT, "lm_head.weight", model, vocabulary_size)


def _llama_mlp(architecture: str, model: ModelConfig, layer: int, kind: str) -> Iterator[Part]:
    """Weights or biases of an MLP: gated, in two tensors or (Phi3) one; or not gated (Starcoder2)."""
    hidden, ffn, mlp = model.hidden_size, model.ffn_width, f"model.layers.{layer}.mlp."
    axes = 2 if kind == "weight" else 1
    second = "c_proj" if architecture == "Starcoder2ForCausalLM" else "down_proj"
    if architecture == "Starcoder2ForCausalLM":
        yield copied(f"{_FC1}.{kind}", layer, f"{mlp}c_fc.{kind}", (ffn, hidden)[:axes])
    elif architecture == "Phi3ForCausalLM":
        yield copied(f"{_FC1}.{kind}", layer, f"{mlp}gate_up_proj.{kind}", (2 * ffn, hidden)[:axes])
    else:
        gated = [f"{mlp}{name}_proj.{kind}" for name in ("gate", "up")]
        yield stacked(f"{_FC1}.{kind}", layer, gated, (2 * ffn, hidden)[:axes])
    yield copied(f"{_FC2}.{kind}", layer, f"{mlp}{second}.{kind}", (hidden, ffn)[:axes])


def _gpt_neox(model: ModelConfig, vocabulary_size: int) -> Iterator[Part]:
    """GPT-NeoX and Pythia. Its qkv weight lies by head, as ours does where every head has its own key and value."""
    hidden, ffn = model.hidden_size, model.ffn_width
    yield vocabulary_weight(EMBEDDING, "gpt_neox.embed_in.weight", model, vocabulary_size)
    for layer in range(model.num_layers):
        prefix = f"gpt_neox.layers.{layer}."
        attention, mlp = f"{prefix}attention.", f"{prefix}mlp."
        for kind, shape in (("weight", (hidden,)), ("bias", ())):
            yield copied(f"{_QKV}.layer_norm_{kind}", layer, f"{prefix}input_layernorm.{kind}", (hidden,))
            yield copied(f"{_QKV}.{kind}", layer, f"{attention}query_key_value.{kind}", (3 * hidden, *shape))
            yield copied(f"{_PROJECTION}.{kind}", layer, f"{attention}dense.{kind}", (hidden, *shape))
            yield copied(f"{_FC1}.layer_norm_{kind}", layer, f"{prefix}post_attention_layernorm.{kind}", (hidden,))
            yield copied(f"{_FC1}.{kind}", layer, f"{mlp}dense_h_to_4h.{kind}", (ffn, *shape))
            yield copied(f"{_FC2}.{kind}", layer, f"{mlp}dense_4h_to_h.{kind}", (hidden, *((ffn,) if shape else ())))
    for kind in ("weight", "bias"):
        yield copied(f"{_FINAL}.{kind}", None, f"gpt_neox.final_layer_norm.{kind}", (hidden,))
    if model.untie_embeddings_and_output_weights:
        yield vocabulary_weight(OUTPUT, "embed_out.weight", model, vocabulary_size)


def _gpt2(model: ModelConfig, vocabulary_size: int, context: int) -> Iterator[Part]:
    """GPT-2: queries of all heads, then keys, then values; weights transposed."""
    hidden, ffn = model.hidden_size, model.ffn_width
    yield vocabulary_weight(EMBEDDING, "transformer.wte.weight", model, vocabulary_size)
    yield copied(_POSITIONS, None, "transformer.wpe.weight", (model.max_position_embeddings or context, hidden))
    heads = model.num_attention_heads
    for layer in range(model.num_layers):
        prefix = f"transformer.h.{layer}."
        for key, norm in ((_QKV, "ln_1"), (_FC1, "ln_2")):
            for kind in ("weight", "bias"):
                yield copied(f"{key}.layer_norm_{kind}", layer, f"{prefix}{norm}.{kind}", (hidden,))
        yield Part(
            key=f"{_QKV}.weight",
            layer=layer,
            shape=(3 * hidden, hidden),
            sources=((f"{prefix}attn.c_attn.weight", (hidden, 3 * hidden)),),
            join=lambda tensors: join_qkv(heads, tensors[0].t().chunk(3)),
            split=lambda whole: [torch.cat(split_qkv(heads, heads, whole)).t().contiguous()],
        )
        yield Part(
            key=f"{_QKV}.bias",
            layer=layer,
            shape=(3 * hidden,),
            sources=((f"{prefix}attn.c_attn.bias", (3 * hidden,)),),
            join=lambda tensors: join_qkv(heads, tensors[0].chunk(3)),
            split=lambda whole: [torch.cat(split_qkv(heads, heads, whole))],
        )
        for key, name, shape in (
            (_PROJECTION, f"{prefix}attn.c_proj", (hidden, hidden)),
            (_FC1, f"{prefix}mlp.c_fc", (ffn, hidden)),
            (_FC2, f"{prefix}mlp.c_proj", (hidden, ffn)),
        ):
            yield transposed(f"{key}.weight", layer, f"{name}.weight", shape)
            yield copied(f"{key}.bias", layer, f"{name}.bias", shape[:1])
    for kind in ("weight", "bias"):
        yield copied(f"{_FINAL}.{kind}", None, f"transformer.ln_f.{kind}", (hidden,))
    if model.untie_embeddings_and_output_weights:
        yield vocabulary_weight(OUTPUT, "lm_head.weight", model, vocabulary_size)


def _opt(model: ModelConfig, vocabulary_size: int, context: int) -> Iterator[Part]:
    """OPT. Its table of positions begins with two rows that no position of a text has."""
    hidden, ffn, rows = model.hidden_size, model.ffn_width, model.max_position_embeddings or context
    yield vocabulary_weight(EMBEDDING, "model.decoder.embed_tokens.weight", model, vocabulary_size)
    yield Part(
        key=_POSITIONS,
        layer=None,
        shape=(rows, hidden),
        sources=(("model.decoder.embed_positions.weight", (rows + 2, hidden)),),
        join=lambda tensors: tensors[0][2:].clone(),
        split=lambda whole: [torch.cat([whole.new_zeros(2, hidden), whole])],
    )
    for layer in range(model.num_layers):
        prefix = f"model.decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            yield copied(f"{_QKV}.layer_norm_{kind}", layer, f"{prefix}self_attn_layer_norm.{kind}", (hidden,))
            yield copied(f"{_FC1}.layer_norm_{kind}", layer, f"{prefix}final_layer_norm.{kind}", (hidden,))
        for kind in ("weight",) if model.disable_bias_linear else ("weight", "bias"):
            axes = 2 if kind == "weight" else 1
            projections = [f"{prefix}self_attn.{name}_proj.{kind}" for name in "qkv"]
            yield grouped(f"{_QKV}.{kind}", layer, projections, model, (hidden,)[: axes - 1])
            yield copied(f"{_PROJECTION}.{kind}", layer, f"{prefix}self_attn.out_proj.{kind}", (hidden, hidden)[:axes])
            yield copied(f"{_FC1}.{kind}", layer, f"{prefix}fc1.{kind}", (ffn, hidden)[:axes])
            yield copied(f"{_FC2}.{kind}", layer, f"{prefix}fc2.{kind}", (hidden, ffn)[:axes])
    for kind in ("weight", "bias"):
        yield copied(f"{_FINAL}.{kind}", None, f"model.decoder.final_layer_norm.{kind}", (hidden,))
    if model.untie_embeddings_and_output_weights:
        yield vocabulary_weight(OUTPUT, "lm_head.weight", model, vocabulary_size)


def _gpt_model(model: ModelConfig, vocabulary_size: int, context: int) -> Iterator[Part]:
    """megatron-core's GPTModel, whose tensors are ours. The names are those of a layer: ours with the layer's number."""
    hidden, ffn, heads = model.hidden_size, model.ffn_width, model.num_attention_heads * model.head_width
    of_norm = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    biases = not model.disable_bias_linear
    shapes: dict[str, Shape] = {
        f"{_QKV}.weight": (heads + 2 * model.query_groups * model.head_width, hidden),
        f"{_PROJECTION}.weight": (hidden, heads),
        f"{_FC1}.weight": (2 * ffn if model.swiglu else ffn, hidden),
        f"{_FC2}.weight": (hidden, ffn),
    }
    with_bias = (_QKV, _PROJECTION, _FC1, _FC2) if biases else (_QKV,) if model.add_qkv_bias else ()
    shapes |= {f"{key}.bias": shapes[f"{key}.weight"][:1] for key in with_bias}
    for kind in of_norm:
        shapes |= {f"{_QKV}.layer_norm_{kind}": (hidden,), f"{_FC1}.layer_norm_{kind}": (hidden,)}
        if model.qk_layernorm:
            shapes |= {f"decoder.layers.self_attention.{name}_layernorm.{kind}": (model.head_width,) for name in "qk"}
    yield vocabulary_weight(EMBEDDING, EMBEDDING, model, vocabulary_size)
    if model.position_embedding_type == "learned_absolute":
        yield copied(_POSITIONS, None, _POSITIONS, (model.max_position_embeddings or context, hidden))
    for layer in range(model.num_layers):
        for key, shape in shapes.items():
            yield copied(key, layer, key.replace("decoder.layers.", f"decoder.layers.{layer}."), shape)
    for kind in of_norm:
        yield copied(f"{_FINAL}.{kind}", None, f"{_FINAL}.{kind}", (hidden,))
    if model.untie_embeddings_and_output_weights:
        yield vocabulary_weight(OUTPUT, OUTPUT, model, vocabulary_size)
