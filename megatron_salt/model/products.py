"""The output head's matrix products, and how a CPU makes those of bfloat16 numbers.

A CPU without bfloat16 products emulates them, several times slower than it multiplies float32. There operands are widened to float32
band by band, multiplied, and the sum is rounded to bfloat16 once. `widens` alone decides. MEGATRON_SALT_BFLOAT16_PRODUCTS set to
`native` or `widened` overrides it. The two forms differ in the order of sums; and a widened product that is added to a float32 sum
is not rounded before, as on a GPU. No operand has a whole float32 copy, but hidden states of one chunk.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_salt.errors import UserError
from megatron_salt.model.vocab_parallel import slices

FORM = "MEGATRON_SALT_BFLOAT16_PRODUCTS"
BAND = 1 << 20
"""Numbers of an operand that are float32 at one time: a CPU's cache holds them."""
_WITHOUT_PRODUCTS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA under which oneDNN uses no bfloat16 product."""


def widens(dtype: torch.dtype, device: torch.device, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether products of such numbers are made in float32: bfloat16, on an x86 CPU that has no bfloat16 products or may not use them."""
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
    """hidden @ weight^T into `out` [n, v]."""
    if not widens(hidden_nh.dtype, hidden_nh.device):
        return torch.mm(hidden_nh, weight_vh.t(), out=out)
    wide_nh = hidden_nh.float()
    size = _band_rows(weight_vh.size(0), max(hidden_nh.shape), band)
    product, operand = wide_nh.new_empty(hidden_nh.size(0) * size), wide_nh.new_empty((size, weight_vh.size(1)))
    for rows in slices(weight_vh.size(0), size):
        wide_vh = operand[: rows.stop - rows.start].copy_(weight_vh[rows])
        room = product[: hidden_nh.size(0) * wide_vh.size(0)].view(hidden_nh.size(0), -1)
        out[:, rows].copy_(torch.mm(wide_nh, wide_vh.t(), out=room))
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
    """total (float32 [v, h]) += gradient^T @ hidden, of bfloat16 numbers on a CPU, band by band.

    A native product is bfloat16 and is still in the cache when it is added.
    """
    if widens(gradient_nv.dtype, gradient_nv.device):
        wide_nh = hidden_nh.float()
        for rows in slices(total_vh.size(0), _band_rows(total_vh.size(0), max(hidden_nh.shape), band)):
            total_vh[rows].addmm_(gradient_nv[:, rows].float().t(), wide_nh)
        return
    size = max(1, min(total_vh.size(0), band // total_vh.size(1)))
    room = hidden_nh.new_empty((size, total_vh.size(1)))
    for rows in slices(total_vh.size(0), size):
        product = torch.mm(gradient_nv[:, rows].t(), hidden_nh, out=room[: rows.stop - rows.start])
        total_vh[rows].add_(product)


def _band_rows(num_rows: int, width: int, band: int) -> int:
    """Rows of the vocabulary at one time, at least 1."""
    return max(1, min(num_rows, band // max(1, width)))
