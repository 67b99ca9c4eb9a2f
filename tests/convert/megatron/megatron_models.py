"""Checkpoints that megatron-core itself writes of its GPTModel, in the forms of Megatron-LM and Megatron-Bridge, and its losses.

Two ranks, tensor parallel; a distributed optimizer that has taken a step; random state and extra state that no restricted reader opens;
args with an enum, a dtype and an object.
"""

from __future__ import annotations

import argparse
import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_salt.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_salt.data.reference_batch import fixed_batch, prefix_lengths
from megatron_salt.model.gpt import transformer_config
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh
from megatron_salt.train.build_model import build_optimizer, wrap_in_ddp

IDS = 257
ROWS = 384
"""257 ids padded to a multiple of 64 x tp 2."""
CONTEXT = 64
PARALLEL = ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True)

LLAMA = ModelConfig(
    num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=2, kv_channels=16, normalization="RMSNorm",
    norm_epsilon=1e-6, position_embedding_type="rope", rotary_base=500000.0, rotary_percent=0.5, rope_scaling="llama3",
    rope_scaling_factor=8.0, swiglu=True, qk_layernorm=True, disable_bias_linear=True, add_qkv_bias=True,
    untie_embeddings_and_output_weights=True,
)  # fmt: skip
GPT2 = ModelConfig(
    num_layers=3, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=2, kv_channels=16, gelu_tanh=True,
    qk_layernorm=True, max_position_embeddings=CONTEXT,
)  # fmt: skip


class Backend(enum.Enum):
    """An enum as Megatron-LM's args have them."""

    AUTO = 5


class Opaque:
    """An object that only an unrestricted pickle reader builds."""


@dataclass(frozen=True)
class Form:
    """What one program writes."""

    model: ModelConfig
    content: dict[str, Any]
    """megatron-core's metadata of the sharded state dict: how layers and halves of weights are named."""
    has_args: bool = True
    common_file: bool = True
    """Whether what is no tensor lies in common.pt; else it is an object in the shards."""
    own_norm_names: bool = False


FORMS = {
    "stacked layers": Form(LLAMA, {}),
    "a key for each layer": Form(GPT2, {"non_homogeneous_layers": True}, common_file=False),
    "halves of weights": Form(LLAMA, {"singleton_local_shards": True}, has_args=False, common_file=False, own_norm_names=True),
}


def write_tokenizer(path: Path, more: Sequence[str] = ()) -> None:
    """tokenizer.json with a token for each byte, the end of a document, and `more`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *more])
    tokenizer.save(str(path))


def args_of(model: ModelConfig) -> argparse.Namespace:
    """Megatron-LM's args."""
    return argparse.Namespace(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_width,
        num_attention_heads=model.num_attention_heads, group_query_attention=True, num_query_groups=model.query_groups,
        kv_channels=model.head_width, max_position_embeddings=CONTEXT, seq_length=CONTEXT,
        position_embedding_type=model.position_embedding_type, add_position_embedding=True, use_rotary_position_embeddings=False,
        rotary_base=int(model.rotary_base), rotary_percent=model.rotary_percent, use_rope_scaling=model.rope_scaling == "llama3",
        rope_scaling_factor=8.0, rotary_interleaved=False, rotary_seq_len_interpolation_factor=None,
        normalization=model.normalization, norm_epsilon=model.norm_epsilon, apply_layernorm_1p=False, qk_layernorm=model.qk_layernorm,
        swiglu=model.swiglu, squared_relu=False, quick_geglu=False, openai_gelu=False, bias_gelu_fusion=True,
        add_bias_linear=not model.disable_bias_linear, add_qkv_bias=True, num_experts=None, mtp_num_layers=None,
        multi_latent_attention=False, spec=None, window_size=None, moe_layer_freq=1, init_method_std=0.02, hidden_dropout=0.1,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights, padded_vocab_size=ROWS,
        make_vocab_size_divisible_by=64, tensor_model_parallel_size=2, attention_backend=Backend.AUTO, params_dtype=torch.float32,
        timers=Opaque(), transformer_impl="local",
    )  # fmt: skip


def provider_of(model: ModelConfig) -> dict[str, Any]:
    """The model in Megatron-Bridge's run_config.yaml."""
    return dict(
        _target_="megatron.bridge.models.gpt_provider.GPTModelProvider", num_layers=model.num_layers, hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_width, num_attention_heads=model.num_attention_heads, num_query_groups=model.query_groups,
        kv_channels=model.head_width, seq_length=CONTEXT, position_embedding_type="rope", rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent, rope_scaling=True, rope_scaling_factor=8.0, seq_len_interpolation_factor=None,
        normalization=model.normalization, layernorm_epsilon=model.norm_epsilon, layernorm_zero_centered_gamma=False,
        qk_layernorm=True, gated_linear_unit=True, bias_activation_fusion=True, add_bias_linear=False, add_qkv_bias=True,
        activation_func={"_target_": "torch.nn.functional.silu", "_call_": False}, num_moe_experts=None, init_method_std=0.02,
        params_dtype={"_target_": "torch.float32", "_call_": False}, share_embeddings_and_output_weights=False,
        transformer_layer_spec={"_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False},
        vocab_size=IDS, make_vocab_size_divisible_by=64, should_pad_vocab=True, tensor_model_parallel_size=2,
    )  # fmt: skip


def gpt_model(model: ModelConfig, rows: int, own_norm_names: bool, mesh: Mesh) -> GPTModel:
    """megatron-core's GPTModel in this layout, of plain torch modules."""
    config = replace(transformer_config(model, PARALLEL, torch.float32), gradient_accumulation_fusion=False)
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization=model.normalization)
    if own_norm_names:
        spec.submodules.sharded_state_dict_keys_map = {}
    return GPTModel(
        config, spec, vocab_size=rows, max_sequence_length=CONTEXT, position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent, rotary_base=int(model.rotary_base), rope_scaling=model.rope_scaling == "llama3",
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights, pg_collection=mesh.groups,
    )  # fmt: skip


def logits_of(gpt: torch.nn.Module, tokens: Tensor, positions: Tensor, mesh: Mesh) -> Tensor:
    """[b, s, ids] on every rank."""
    causal = torch.ones(tokens.size(1), tokens.size(1)).triu(1).bool()[None, None]  # True where a query must not attend
    parts = [torch.empty(0)] * 2
    own = gpt(tokens, positions, causal).detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(parts, own, group=mesh.groups.tp)
    return torch.cat(parts, -1)[..., :IDS]


def losses_of(gpt: torch.nn.Module, mesh: Mesh) -> list[float]:
    """On the reference batch."""
    losses = []
    with torch.no_grad():
        for part in fixed_batch(IDS, CONTEXT, prefix_lengths(CONTEXT)):
            logits = logits_of(gpt, part.tokens, part.position_ids, mesh)
            each = F.cross_entropy(logits.transpose(1, 2), part.labels, reduction="none")
            losses.append(float((each * part.loss_mask).sum() / part.loss_mask.sum()))
    return losses


def write_checkpoint(root: Path, name: str) -> list[float]:
    """In both ranks: train a step, save as the form says; returns the losses of what was saved."""
    form = FORMS[name]
    mesh = make_student_mesh(student_layout(PARALLEL, 2))
    seed_everything(7, mesh)
    gpt = gpt_model(form.model, ROWS, form.own_norm_names, mesh)
    with torch.no_grad():  # biases and norms would start at 0 and 1, and hide what becomes of them
        generator = torch.Generator().manual_seed(3)
        for parameter in gpt.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.ndim == 1 else 0.05))
    [ddp] = wrap_in_ddp([gpt], PARALLEL, mesh)
    optimizer = build_optimizer([ddp], OptimizerConfig(lr=1e-3), PARALLEL, torch.float32, mesh)
    part = fixed_batch(IDS, CONTEXT, [CONTEXT])[0]
    causal = torch.ones(CONTEXT, CONTEXT).triu(1).bool()[None, None]
    ddp(part.tokens, part.position_ids, causal).float().square().mean().backward()
    ddp.finish_grad_sync()
    for parameter in gpt.parameters():
        if not getattr(parameter, "tensor_model_parallel", False):  # else the copies of a norm over heads would part
            dist.all_reduce(parameter.main_grad, group=mesh.groups.tp)
    optimizer.step()
    content = {"dp_cp_group": mesh.groups.dp_cp, "distrib_optim_sharding_type": "dp_reshardable", **form.content}
    model_state = gpt.sharded_state_dict(metadata=content)
    state: dict[str, Any] = {
        "checkpoint_version": 3.0,
        "iteration": 123,
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=False, metadata=content),
        "rng_state": ShardedObject("rng_state", Opaque(), (2,), (dist.get_rank(),)),
        "extra": ShardedObject(
            "decoder.layers.self_attention.linear_qkv._extra_state", Opaque(), (2,), (dist.get_rank(),), replica_id=0
        ),
        "content_metadata": {"distrib_optim_sharding_type": "dp_reshardable", **form.content},
    }
    if form.has_args:
        state["args"] = args_of(form.model)
    common = {
        key: value for key, value in state.items() if key in ("args", "iteration", "checkpoint_version", "content_metadata")
    }
    directory = root / "iter_0000123"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    if not form.common_file:  # as megatron-core 0.19 does; 0.16 writes common.pt beside it, which is removed
        state["common"] = ShardedObject("common_state", common, (1,), (0,), replica_id=dist.get_rank())
        state = {key: value for key, value in state.items() if key not in common}
    dist_checkpointing.save(state, str(directory), validate_access_integrity=False)
    if dist.get_rank() == 0:
        (directory / "common.pt").unlink(missing_ok=True)
        if form.common_file:
            torch.save(common, directory / "common.pt")
        (root / "latest_checkpointed_iteration.txt").write_text("123")
        if not form.has_args:
            (directory / "run_config.yaml").write_text(json.dumps({"model": provider_of(form.model), "train": {}}))
    return losses_of(gpt, mesh)


def losses_of_export(root: Path, model: ModelConfig, rows: int) -> tuple[list[float], dict[str, Any]]:
    """In both ranks: what GPTModel computes after megatron-core has loaded an export, and the args that it found."""
    mesh = make_student_mesh(student_layout(PARALLEL, 2))
    seed_everything(8, mesh)
    gpt = gpt_model(model, rows, False, mesh)
    directory = str(root / (root / "latest_checkpointed_iteration.txt").read_text())
    asked = gpt.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp})
    # strict="log_all" does the same, but megatron-core 0.19 cannot under torch 2.15
    state = {"model": {name: entry for name, entry in asked.items() if not name.endswith("_extra_state")}}
    loaded = dist_checkpointing.load(state, directory)
    gpt.load_state_dict(loaded["model"], strict=False)
    assert (loaded["checkpoint_version"], loaded["iteration"]) == (3.0, 0)
    return losses_of(gpt, mesh), vars(loaded["args"])
