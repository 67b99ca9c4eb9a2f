"""Transformer Engine's layers stand where torch's do: with the same weights they give the same hidden states, loss and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.gpt import GPT
from megatron_salt.model.layers import torch_parts
from megatron_salt.model.precision import TORCH
from tests.support.ranks import run_ranks
from tests.support.small import MODELS
from tests.te import engine

LENGTH, VOCABULARY = 32, 250


def give_weights(torch_model: GPT, engine_model: GPT) -> None:
    """Every parameter of the one to the other, by the names that a checkpoint has."""
    saved_as = torch_parts(torch_model.config).saved_as
    source = dict(torch_model.named_parameters())
    renamed = {}
    for name, parameter in source.items():
        for mine, theirs in saved_as.items():
            name = name.replace(mine, theirs)
        renamed[name] = parameter
    target = dict(engine_model.named_parameters())
    assert renamed.keys() == target.keys() and len(target) == len(source)
    with torch.no_grad():
        for name, parameter in target.items():
            parameter.copy_(renamed[name])


def passed(model: GPT, documents: Tensor | None) -> dict[str, Tensor]:
    """One pass forward and backward."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
    mask = model.attention_mask(documents, LENGTH, tokens.device)
    for parameter in model.parameters():  # as under megatron-core's data parallelism
        parameter.main_grad = torch.zeros(parameter.shape)
    hidden = model(tokens[:, :-1], torch.arange(LENGTH).expand(2, -1), mask)
    total, _ = model.loss(hidden, tokens[:, 1:].contiguous(), torch.ones(2, LENGTH))
    total.backward()
    layer = model.decoder.layers[0]
    norm = layer.input_layernorm.weight if model.precision == TORCH else layer.self_attention.linear_qkv.layer_norm_weight
    first, last = layer.mlp.linear_fc1.weight, model.decoder.layers[-1].self_attention.linear_proj.weight
    gradients = [weight.main_grad if model.precision == TORCH else weight.grad.float() for weight in (first, last)]
    return {"hidden": hidden.detach(), "loss": total.detach(), "norm": norm.grad, "first": gradients[0], "last": gradients[1]}


def both(model: ModelConfig, with_documents: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    documents = (torch.arange(LENGTH) // 11).expand(2, -1) if with_documents else None
    [of_torch], _ = engine.build(model, ParallelConfig(), TORCH, 1)
    expected = passed(of_torch, documents)
    with engine.gpu_seen():
        of_engine = GPT(
            engine_config(model),
            model,
            vocabulary_size=VOCABULARY,
            seq_length=LENGTH,
            chunk_tokens=24,
            groups=of_torch.pg_collection,
            pre_process=True,
            post_process=True,
            vp_stage=None,
            precision=engine.ENGINE,
        )
    engine.unfused(of_engine)
    of_engine.config.gradient_accumulation_fusion = False
    give_weights(of_torch, of_engine)
    with engine.books_alone():
        return expected, passed(of_engine, documents)


def engine_config(model: ModelConfig):
    from megatron_salt.model.gpt import transformer_config

    return transformer_config(model, ParallelConfig(), torch.bfloat16, engine.ENGINE)


@pytest.mark.parametrize("name, with_documents", [("tied", False), ("untied", True), ("squared relu", False)])
def test_the_same_weights_give_the_same(name: str, with_documents: bool) -> None:
    [(expected, found)] = run_ranks(1, both, MODELS[name], with_documents)
    assert float(expected["loss"]) > 100  # a sum over 64 tokens
    for what in expected:
        torch.testing.assert_close(found[what], expected[what], rtol=2e-2, atol=2e-2 * float(expected[what].abs().max()))
    assert (
        torch.nn.functional.cosine_similarity(found["hidden"].flatten().float(), expected["hidden"].flatten().float(), 0)
        > 0.9999
    )
