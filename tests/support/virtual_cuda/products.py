"""Matrix products with a float32 result from bfloat16 operands, which torch has on CUDA alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tests.support.virtual_cuda.memory import footprint, on_gpu, place
from tests.support.virtual_cuda.mode import inspect_devices
from tests.support.virtual_cuda.recorder import Recorder


def map_products(recorder: Recorder) -> None:
    """`out_dtype` of torch.mm, bmm, addmm and baddbmm on tensors of the GPU. The operands are widened; CUDA's sums are float32 too."""
    module: Any = torch
    for name in ("mm", "bmm", "addmm", "baddbmm"):
        setattr(module, name, _with_out_dtype(getattr(torch, name), name, recorder))


def _with_out_dtype(product: Any, name: str, recorder: Recorder) -> Any:
    @functools.wraps(product)
    def call(*operands: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None, **named: Any) -> Tensor:
        if out_dtype is None:
            return product(*operands, **named) if out is None else product(*operands, **named, out=out)
        *added, left, right = operands
        assert on_gpu(left), "out_dtype needs CUDA"
        assert left.dtype == right.dtype, (left.dtype, right.dtype)
        for tensor in (*added, *(() if out is None else (out,))):
            assert tensor.dtype == out_dtype, (tensor.dtype, out_dtype)
        touched = [*operands, *(() if out is None else (out,))]
        inspect_devices(recorder, f"aten::{name}.dtype", touched)
        with recorder.quiet():
            result = product(*added, left.to(out_dtype), right.to(out_dtype), **named)
            result = place(result, gpu=True) if out is None else out.copy_(result)
        recorder.kernel(f"aten::{name}.dtype", sum(map(footprint, operands)) + footprint(result))
        return result

    return call
