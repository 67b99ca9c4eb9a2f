"""Transformer Engine on a machine without a GPU: its own code builds its modules on the CPU, or on meta, and keeps its books there.

Its constructors ask only whether there is CUDA, and its checks only for a compute capability: `gpu_seen` answers both. What is
compiled (products, norms, casts, attention) needs a GPU; `books_alone` runs a forward with torch's products in their place. All that
decides what is scaled by what, and which ranks are asked, is the installed package's. Importing this module skips the tests that
import it where Transformer Engine is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("needs Transformer Engine: make test-te", allow_module_level=True)

import transformer_engine.pytorch as te
import transformer_engine.pytorch.quantization as quantization
from transformer_engine.pytorch import utils

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.model.gpt import GPT, build_model
from megatron_salt.model.precision import Precision
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh

ENGINE = Precision(implementation="transformer_engine", document_masks=True)
"""With torch's attention, which runs on a CPU."""


def fp8(recipe: str, **fields: object) -> Precision:
    return Precision(implementation="transformer_engine", fp8_format="hybrid", fp8_recipe=recipe, document_masks=True, **fields)


@contextmanager
def capability_seen(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """The answer to a question for the device's compute capability."""
    properties = types.SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132, name="none")
    verdicts = ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT")
    utils._get_device_compute_capability.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.multiple(quantization, **dict.fromkeys(verdicts)),
    ):
        yield
    utils._get_device_compute_capability.cache_clear()


@contextmanager
def gpu_seen(capability: tuple[int, int] = (9, 0), meta: bool = False) -> Iterator[None]:
    """A GPU of that compute capability, as far as Transformer Engine asks. meta: whatever is built on "the current device" is on meta."""
    device = "meta" if meta else "cpu"
    with (
        capability_seen(capability),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "current_device", return_value=device),
        torch.device(device),
    ):
        yield


def build(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    world_size: int,
    vocabulary_size: int = 250,
    seq_length: int = 32,
) -> tuple[list[GPT], Mesh]:
    """This rank's chunks of a student on the CPU, freshly initialised in bfloat16. Collective over all ranks."""
    quantization.FP8GlobalStateManager.reset()  # it knows the modules and groups of the tests before
    mesh = make_student_mesh(student_layout(parallel, world_size), parallel.virtual_stages)
    seed_everything(1234, mesh)
    with gpu_seen():
        chunks = build_model(model, parallel, seq_length, vocabulary_size, torch.bfloat16, 24, mesh, precision)
    for chunk in chunks:
        unfused(chunk)
    return chunks, mesh


def unfused(model: GPT) -> None:
    """Leave out what torch would compile, or what is a kernel."""
    model.config.bias_dropout_fusion = model.config.bias_activation_fusion = model.config.apply_rope_fusion = False


class _Product(torch.autograd.Function):
    """x w^T, whose backward notes a maximum and, in the first module of a context, has the maxima reduced: as `_Linear.backward` does."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, linear: Any, is_first: bool) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.linear, ctx.is_first = linear, is_first
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inputs, weight = ctx.saved_tensors
        if ctx.linear.fp8 and ctx.linear.fp8_meta["recipe"].delayed():
            ctx.linear.fp8_meta["scaling_bwd"].amax_history[0][0] = grad.abs().amax()
        if ctx.is_first:
            quantization.FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return grad @ weight, grad.flatten(0, -2).t() @ inputs.flatten(0, -2), None, None


def _forward(linear: Any, inputs: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        inputs = linear.prepare_forward(inputs)
    if isinstance(linear, te.LayerNormLinear):
        inputs = F.rms_norm(inputs, inputs.shape[-1:], linear.layer_norm_weight, linear.eps)
    if linear.fp8 and linear.fp8_meta["recipe"].delayed():
        linear.fp8_meta["scaling_fwd"].amax_history[0][:2] = torch.stack(
            [inputs.abs().amax(), linear.weight.abs().amax()]
        ).detach()
    is_first = linear.fp8 and torch.is_grad_enabled() and quantization.FP8GlobalStateManager.is_first_fp8_module()
    out = _Product.apply(inputs, linear.weight, linear, is_first)
    linear.end_forward()
    return (out, linear.bias) if linear.te_return_bias else out


@contextmanager
def books_alone() -> Iterator[None]:
    """Transformer Engine's linears and RMSNorm with torch's products, and the maxima and scales that go with them updated in Python, by
    Transformer Engine's other path. Sums over tensor-parallel ranks are left out."""

    def norm(module: Any, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, inputs.shape[-1:], module.weight, module.eps)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", {"NVTE_UNFUSED_FP8_UPDATE": "1"}))
        for linear in (te.Linear, te.LayerNormLinear):
            stack.enter_context(mock.patch.object(linear, "forward", _forward))
        stack.enter_context(mock.patch.object(te.RMSNorm, "forward", norm))
        yield


@contextmanager
def casts_in_torch() -> Iterator[None]:
    """Tensorwise FP8 with torch's casts, which on a GPU are kernels: to e4m3 at the scale of the tensor's maximum, and back."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Tensor

    largest = torch.finfo(torch.float8_e4m3fn).max

    def quantize(quantizer: Float8CurrentScalingQuantizer, tensor: Tensor) -> Float8Tensor:
        scale = largest / tensor.float().abs().amax()
        data = (tensor.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8)
        return Float8Tensor(
            shape=data.shape, dtype=tensor.dtype, data=data, fp8_scale_inv=scale.reciprocal().view(1), fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
        )  # fmt: skip

    def update(
        quantizer: Float8CurrentScalingQuantizer, source: Tensor, target: Float8Tensor, *, noop_flag: None = None
    ) -> Float8Tensor:
        made = quantize(quantizer, source)
        target._data.copy_(made._data)
        target._scale_inv.copy_(made._scale_inv)
        return target

    def dequantize(tensor: Float8Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        return (tensor._data.view(torch.float8_e4m3fn).float() * tensor._scale_inv).to(dtype or tensor.dtype)

    with (
        mock.patch.multiple(Float8CurrentScalingQuantizer, quantize_impl=quantize, update_quantized=update),
        mock.patch.object(Float8Tensor, "dequantize", dequantize),
    ):
        yield
