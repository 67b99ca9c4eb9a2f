"""The matrix products of the output head, and how a CPU computes them in bfloat16.

Logits have the operands' dtype (the student's), or are float32 (a teacher's, and those of scores): the sums of the product, not rounded.
A GPU has a product of bfloat16 numbers with a float32 result. A CPU has none: operands are widened to float32 band by band and
multiplied.

A CPU without bfloat16 products emulates them, several times slower than float32 products. On such a CPU operands are widened for the
other products too, and the sum is rounded to bfloat16 once. Only `widens` decides; MEGATRON_SALT_BFLOAT16_PRODUCTS set to `native` or
`widened` overrides it. The two forms differ in the order of sums. A widened product that is added to a float32 sum is not rounded
before, as on a GPU. Only the hidden states of one chunk have a whole float32 copy.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_salt.errors import UserError
from megatron_salt.model.kernels.passes import slices

FORM = "MEGATRON_SALT_BFLOAT16_PRODUCTS"
BAND = 1 << 20
"""Numbers of an operand that are float32 at one time: they fit into the cache of a CPU."""
_WITHOUT_PRODUCTS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA with which oneDNN uses no bfloat16 products."""


def widens(dtype: torch.dtype, device: torch.device, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether products of this dtype are computed in float32.

    True for bfloat16 on an x86 CPU that has no bfloat16 products or may not use them.
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    form = environment.get(FORM, "")
    if form not in ("", "native", "widened"):
        raise UserError(f"{FORM} is {form}: it is native, widened or unset")
    if form:
        return form == "widened"
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    cap = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    return cap.upper() in _WITHOUT_PRODUCTS or not torch.cpu._is_avx512_bf16_supported()


def logits(hidden_nh: Tensor, weight_vh: Tensor, out: Tensor, band: int = BAND) -> Tensor:
    """hidden @ weight^T into `out` [n, v], which has the operands' dtype or is float32. Columns of `out` are contiguous."""
    unrounded = out.dtype != hidden_nh.dtype
    if unrounded and hidden_nh.is_cuda:
        return torch.mm(hidden_nh, weight_vh.t(), out_dtype=out.dtype, out=out)
    if not unrounded and not widens(hidden_nh.dtype, hidden_nh.device):
        return torch.mm(hidden_nh, weight_vh.t(), out=out)
    wide_nh = hidden_nh.float()
    size = _band_rows(weight_vh.size(0), max(hidden_nh.shape), band)
    operand = wide_nh.new_empty((size, weight_vh.size(1)))
    product = None if unrounded else wide_nh.new_empty(hidden_nh.size(0) * size)
    for rows in slices(weight_vh.size(0), size):
        wide_vh = operand[: rows.stop - rows.start].copy_(weight_vh[rows])
        if product is None:
            torch.mm(wide_nh, wide_vh.t(), out=out[:, rows])
        else:
            buffer = product[: hidden_nh.size(0) * wide_vh.size(0)].view(hidden_nh.size(0), -1)
            out[:, rows].copy_(torch.mm(wide_nh, wide_vh.t(), out=buffer))
    return out


def hidden_gradient(gradient_nv: Tensor, weight_vh: Tensor, out: Tensor, band: int = BAND) -> Tensor:
    """gradient @ weight into `out` [n, h]."""
    if not widens(gradient_nv.dtype, gradient_nv.device):
        return torch.mm(gradient_nv, weight_vh, out=out)
    total = torch.zeros(out.shape, dtype=torch.float32)
    size = _band_rows(weight_vh.size(0), max(out.shape), band)
    for rows in slices(weight_vh.size(0), size):
        total.addmm_(gradient_nv[:, rows].float(), weight_vh[rows].float())
    return out.copy_(total)


def add_weight_gradient(total_vh: Tensor, gradient_nv: Tensor, hidden_nh: Tensor, band: int = BAND) -> None:
    """total (float32 [v, h]) += gradient^T @ hidden, in bfloat16 on a CPU, band by band.

    A native product is bfloat16; it is still in the cache when it is added.
    """
    if widens(gradient_nv.dtype, gradient_nv.device):
        wide_nh = hidden_nh.float()
        for rows in slices(total_vh.size(0), _band_rows(total_vh.size(0), max(hidden_nh.shape), band)):
            total_vh[rows].addmm_(gradient_nv[:, rows].float().t(), wide_nh)
        return
    size = max(1, min(total_vh.size(0), band // total_vh.size(1)))
    buffer = hidden_nh.new_empty((size, total_vh.size(1)))
    for rows in slices(total_vh.size(0), size):
        product = torch.mm(gradient_nv[:, rows].t(), hidden_nh, out=buffer[: rows.stop - rows.start])
        total_vh[rows].add_(product)


def _band_rows(num_rows: int, width: int, band: int) -> int:
    """Rows of the vocabulary in one band, at least 1."""
    return max(1, min(num_rows, band // max(1, width)))
