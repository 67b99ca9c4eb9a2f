"""A teacher's weights in FP8 alone: which become so, what is freed, and that they are what FP8's products read."""

from __future__ import annotations

import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.config import ParallelConfig
from megatron_salt.model.fp8_teacher import in_bfloat16, keep_fp8_alone, linears, raw_tensors
from megatron_salt.salt.teacher import tensor_bytes
from tests.support.ranks import run_ranks
from tests.support.small import SMALL
from tests.te import engine


def kept() -> dict[str, object]:
    precision = engine.fp8("tensorwise", forward_only=True)
    [model], _ = engine.build(SMALL, ParallelConfig(), precision, 1)
    model.eval().requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    bytes_before = tensor_bytes(model.decoder)
    with engine.gpu_seen(), engine.casts_in_torch():
        keep_fp8_alone(model)
        keep_fp8_alone(model)  # once is enough
    after = dict(model.named_parameters())
    in_fp8 = {name for name, parameter in after.items() if raw_tensors(parameter)[0] is not parameter}
    error = 0.0
    for name in in_fp8:
        weight = after[name]
        [data] = raw_tensors(weight)  # no transpose beside it
        assert data.dtype == torch.uint8 and data.shape == before[name].shape and not weight.requires_grad
        assert weight._quantizer.rowwise_usage and not weight._quantizer.columnwise_usage
        back = data.view(torch.float8_e4m3fn).float() * weight._scale_inv
        error = max(error, float((back - before[name].float()).abs().max() / before[name].float().abs().max()))
    untouched = all(torch.equal(after[name], before[name]) for name in after.keys() - in_fp8)
    refused = None
    try:
        with in_bfloat16(model):
            pass
    except AssertionError as error_:
        refused = str(error_)
    return {
        "in_fp8": in_fp8, "linears": {f"{name}.weight" for name, module in model.named_modules() if module in set(linears(model))},
        "error": error, "untouched": untouched, "refused": refused,
        "freed": bytes_before - sum(raw.nbytes for tensor in model.decoder.parameters() for raw in raw_tensors(tensor)),
        "elements": sum(before[name].numel() for name in in_fp8),
        "flagged": all(linear.primary_weights_in_fp8 for linear in linears(model)),
    }  # fmt: skip


def test_the_linears_weights_alone_become_fp8_and_nothing_else_is_left_of_them():
    [found] = run_ranks(1, kept)
    assert found["in_fp8"] == found["linears"] and len(found["in_fp8"]) == 4 * SMALL.num_layers
    assert found["untouched"] and found["flagged"]
    assert found["freed"] == found["elements"]  # one byte of two
    assert found["error"] < 2**-4  # of the largest: half a step of e4m3 at the top
    assert found["refused"] == "the bfloat16 weights have been dropped"


@pytest.mark.parametrize("precision", [engine.ENGINE, engine.fp8("tensorwise")])
def test_a_student_is_left_alone(precision):
    run_ranks(1, left_alone, precision)


def left_alone(precision: engine.Precision) -> None:
    [model], _ = engine.build(SMALL, ParallelConfig(), precision, 1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    try:
        keep_fp8_alone(model)
    except AssertionError:
        assert precision.fp8_format is not None
    assert not model.fp8_alone
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
