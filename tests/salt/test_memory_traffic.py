"""The bytes that the cost of stage 1 counts are those that operators read and write, seen by a dispatch mode."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_salt.cards import FLOPS_ALONE, Rates
from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.flops import layer_flops, layer_parameters
from megatron_salt.model.kernels.passes import Blocks, count_above, into_gradient, row_sums
from megatron_salt.salt.head_cost import HeadShape, head_seconds, pass_bytes
from megatron_salt.salt.layer_cost import UPDATE_BYTES, embedding_bytes, layer_bytes, layer_seconds, update_bytes
from megatron_salt.train.step import finish_step, forward_input, forward_step, run_pipeline
from tests.support.ranks import run_ranks
from tests.support.small import SMALL, Case, batch, build_student

SHAPE = HeadShape(rows=512, hidden=64, teacher_hidden=32, tokens=48, chunk_tokens=16, itemsize=2, kernels=False, tempered=True)
PRODUCTS = {"mm", "addmm", "addmm_", "bmm"}
MOVES_NOTHING = {
    "view", "t", "transpose", "slice", "select", "_unsafe_view", "detach", "expand", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "as_strided", "permute", "alias", "unbind", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh",
}  # fmt: skip


ONE_OF_A_ROW = {"gather", "index", "index_put_"}
"""These touch one number of each row of the tensor that they are given."""
OVERWRITES = {"copy_", "zero_", "fill_"}
"""These write their first argument and do not read it."""


class BytesMoved(TorchDispatchMode):
    """Counts the bytes that each operator reads and writes. An `out` is not read; what is changed in place is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = {name: value for name, value in kwargs.items() if name != "out"}
        written: list[Any] = [result]
        if func.overloadpacket.__name__ in OVERWRITES:
            args = args[1:]
        if func is torch.ops.aten._fused_adamw_.default:
            written = [args[0], args[2], args[3]]  # parameters and moments, not the gradients
        elif result is None:  # lists of tensors that change in place
            written = [args[0]]
        tensors = [t for t in tree_flatten((args, read, written))[0] if isinstance(t, torch.Tensor)]
        self.of[func.overloadpacket.__name__] += sum(t.numel() * t.element_size() for t in tensors)
        return result

    def total(self, without: set[str]) -> int:
        return sum(count for name, count in self.of.items() if name not in without | MOVES_NOTHING)


@pytest.mark.parametrize("gate", ["rank", "entropy", "probability"])
def test_a_gate_moves_what_the_formula_says_and_nothing_without_a_teacher(gate):
    tokens, rows = 32, 4096
    logits, teacher = torch.randn(tokens, rows), torch.randn(tokens, rows)
    labels, numbers, blocks = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), Blocks.of(logits)
    with BytesMoved() as moved:
        row_sums(logits, teacher, labels, 0.5, gate == "entropy", blocks)
        if gate == "rank":
            count_above(teacher, numbers, blocks)
        into_gradient(logits, teacher, labels, numbers, numbers, numbers, numbers, 0.5, blocks)
    shape = replace(SHAPE, itemsize=4, gate=gate)
    assert moved.total(ONE_OF_A_ROW) / (tokens * rows) == pytest.approx(pass_bytes(shape, True), rel=0.005)
    assert pass_bytes(shape, False) == pass_bytes(replace(shape, gate=None), False)
    kernels = [pass_bytes(replace(SHAPE, kernels=True, gate=one), True) for one in (None, gate)]
    assert kernels == [14, 18 if gate == "rank" else 14]


@pytest.mark.parametrize("tempered", [True, False])
@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_torch_passes_over_the_logits_move_what_the_formula_says(dtype, taught, tempered):
    tokens, rows, temperature = 32, 4096, 0.5 if tempered else 1.0
    logits, teacher = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, rows) if taught else None
    labels, numbers = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    blocks = Blocks.of(logits)
    with BytesMoved() as moved:
        row_sums(logits, teacher, labels, temperature, False, blocks)
        of_teacher = (numbers, numbers) if taught else (None, None)
        into_gradient(logits, teacher, labels, numbers, numbers, *of_teacher, temperature, blocks)
    shape = replace(SHAPE, itemsize=dtype.itemsize, tempered=tempered)
    assert moved.total(ONE_OF_A_ROW) / (tokens * rows) == pytest.approx(pass_bytes(shape, taught), rel=0.01)


def test_the_kernels_move_6_and_14_bytes_a_logit_in_bfloat16():
    kernels = replace(SHAPE, kernels=True)
    assert (pass_bytes(kernels, False), pass_bytes(kernels, True)) == (6, 14)


def test_the_head_by_hand():
    """Three chunks of 16 tokens. 1 byte/s and so many FLOP/s that products take the time of their bytes."""
    v, h, ht, n = 512, 64, 32, 48
    memory = Rates(1e30, 1.0)
    logits_and_hidden = 2 * n * v + 2 * n * h
    products = 2 * (3 * 2 * v * h + logits_and_hidden) + (3 * 8 * v * h + logits_and_hidden)
    plain = n * v * pass_bytes(SHAPE, False) + 16 * v * h
    assert head_seconds(SHAPE, memory, None) == pytest.approx(products + plain)
    taught = 3 * 2 * v * ht + 2 * n * ht + 4 * n * v + n * v * (pass_bytes(SHAPE, True) - pass_bytes(SHAPE, False))
    assert head_seconds(SHAPE, memory, memory) == pytest.approx(products + plain + taught)
    assert head_seconds(SHAPE, FLOPS_ALONE, FLOPS_ALONE) == pytest.approx(n * (3 * 2 * v * h + 2 * v * ht))


def test_small_chunks_cost_more_and_never_less_than_the_products():
    rates = Rates(1e12, 1e10)
    costs = [head_seconds(replace(SHAPE, chunk_tokens=chunk), rates, rates) for chunk in (1, 4, 16, 48, 1000)]
    assert costs[0] > costs[1] > costs[2] > costs[3] == costs[4]
    assert costs[3] > head_seconds(SHAPE, FLOPS_ALONE, FLOPS_ALONE) / 1e12


WIDE = replace(SMALL, num_layers=2, num_query_groups=4, ffn_hidden_size=192, untie_embeddings_and_output_weights=True)
GELU = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, disable_bias_linear=True)


WEIGHT_GRADIENTS = {"allreduce_coalesced_", "mul_", "add_"}
"""Their exchange, their division by the tokens, and bfloat16 products added to float32 sums."""


def counted(model: ModelConfig, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Bytes of a forward pass, of a forward and backward pass, and of a step of the optimizer; tokens; parameters."""
    student = build_student(Case(model=model, dtype=dtype), 1)
    inputs = [forward_input(one, student.mesh) for one in batch(student, Case(), 0)[:1]]
    passes = []
    for forward_only in (True, False):
        with torch.set_grad_enabled(not forward_only), BytesMoved() as moved:
            run_pipeline(
                student.chunks, forward_step, inputs, student.mesh, student.seq_length, student.micro_batch_size,
                forward_only=forward_only,
            )  # fmt: skip
        passes.append(moved.total(PRODUCTS | WEIGHT_GRADIENTS))
    finish_step(student)  # makes the moments
    with BytesMoved() as moved:
        for chunk in student.chunks:
            chunk.scale_gradients(1000.0)  # as the division by the tokens; and so that gradients are clipped
        finish_step(student)
        for chunk in student.chunks:
            chunk.zero_grad_buffer()
    parameters = sum(parameter.numel() for chunk in student.chunks for parameter in chunk.parameters())
    return passes[0], passes[1], moved.total(set()), inputs[0][0].labels.numel(), parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [WIDE, GELU], ids=["swiglu, rope, RMSNorm", "GELU, LayerNorm"])
def test_a_layer_and_a_parameter_move_what_the_formulas_say(model, dtype):
    """The difference of a model of four layers and one of two."""
    [two], [four] = (run_ranks(1, counted, replace(model, num_layers=layers), dtype) for layers in (2, 4))
    assert two[4] + 2 * layer_parameters(model) == four[4]
    forward, both = ((more - less) / 2 / two[3] for less, more in zip(two[:2], four[:2], strict=True))
    assert forward == pytest.approx(layer_bytes(model, dtype.itemsize, fused=False), rel=0.1)
    assert both == pytest.approx(3 * layer_bytes(model, dtype.itemsize, fused=False), rel=0.1)
    assert (four[2] - two[2]) / (four[4] - two[4]) == pytest.approx(
        UPDATE_BYTES, rel=0.15
    )  # in bfloat16 the rounded parameters too


def test_fused_layers_move_less_and_a_layer_takes_its_products_and_its_bytes():
    for model in (WIDE, GELU, SMALL):
        assert layer_bytes(model, 2, fused=True) <= layer_bytes(model, 2, fused=False)
    seconds = layer_seconds(WIDE, 128, 2, True, Rates(1e12, 1e9))
    values = 6 * 64 + 2 * 2 * 64 + 4 * 64 + 2 * 2 * 64 + 3 * 192
    assert seconds == pytest.approx(layer_flops(WIDE, 128) / 1e12 + 2 * values / 1e9)


def test_the_embedding_and_the_optimizer_by_hand():
    assert embedding_bytes(WIDE, rows=500, itemsize=2) == 500 * 64 * 12
    layer = layer_parameters(WIDE)
    one, two = ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert update_bytes(WIDE, one, [2], rows=500) == UPDATE_BYTES * (2 * layer + 2 * 500 * 64)
    assert update_bytes(WIDE, two, [2, 0], rows=250) == UPDATE_BYTES * (layer + 250 * 64)
