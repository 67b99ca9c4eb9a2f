"""FLOPs of a model equal the count of torch's FLOP counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_salt.config import ModelConfig
from megatron_salt.model.flops import flops_per_token, num_parameters
from megatron_salt.train.build_model import count_parameters
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, SEQ_LENGTH, VOCABULARY, Case, build_student


def plain_loss(model: ModelConfig, ids: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
    """The matrix products of a decoder over ids [s], written out, with new random weights. Attention covers the whole square."""

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, requires_grad=True)

    h, d, heads, groups = model.hidden_size, model.head_width, model.num_attention_heads, model.query_groups
    x = F.embedding(ids, weight(vocabulary_size, h))
    for _ in range(model.num_layers):
        q, k, v = ((x @ weight(h, n * d)).view(-1, n, d).transpose(0, 1) for n in (heads, groups, groups))
        k, v = (part.repeat_interleave(heads // groups, dim=0) for part in (k, v))
        scores = (q @ k.transpose(1, 2)).softmax(-1)
        x = x + (scores @ v).transpose(0, 1).reshape(-1, heads * d) @ weight(heads * d, h)
        up = x @ weight(h, model.ffn_width)
        up = F.silu(x @ weight(h, model.ffn_width)) * up if model.swiglu else F.gelu(up)
        x = x + up @ weight(model.ffn_width, h)
    return F.cross_entropy(x @ weight(h, vocabulary_size), ids)


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4),
        ModelConfig(
            num_layers=3,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            swiglu=True,
            ffn_hidden_size=40,
        ),
        ModelConfig(num_layers=1, hidden_size=64, num_attention_heads=2, squared_relu=True),
    ],
)
def test_flops_are_what_a_counter_counts_less_the_masked_half_of_attention(model):
    seq_length, vocabulary_size = 24, 56
    with FlopCounterMode(display=False) as counter:
        plain_loss(model, torch.randint(vocabulary_size, (seq_length,)), vocabulary_size).backward()
    width = model.num_attention_heads * model.head_width
    masked_half = model.num_layers * 3 * 2 * (2 * width * seq_length / 2)  # per token: two products, forward and twice backward
    assert flops_per_token(model, seq_length, vocabulary_size) == counter.get_total_flops() / seq_length - masked_half


def counted(name: str) -> int:
    return count_parameters(build_student(Case(model=MODELS[name]), 1))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_that_the_model_has(name):
    model = MODELS[name]
    assert run_ranks(1, counted, name) == [num_parameters(model, model.padded_vocabulary_size(VOCABULARY), SEQ_LENGTH)]
