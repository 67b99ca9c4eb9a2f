"""What a GPU can do, by the name that the driver gives it: peak FLOP/s, memory and its bytes/s. Pure.

Figures are the vendor's, without sparsity: where a data sheet gives a rate with sparsity alone, it is halved here. What is marked "our
reading" was not compared with a copy of the data sheet when the table was last checked (2026-11). A GPU that is not in the table is
unknown; nothing is guessed from the likeness of names, because cards of one name differ by a factor of two.
No program reaches a peak. `reached` says which part of it the predictions of this package count on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Products = Literal["bf16", "fp32", "fp8"]
"""Number format of the operands of matrix products. fp32: without TF32, which torch does not use by itself."""

REACHED_FLOPS, REACHED_BYTES = 0.7, 0.9
"""Part of the peaks that large products and passes over memory reach. Our choice: between 0.65 and 0.8 and between 0.85 and 0.93 are
common on GPUs of data centres. Nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Peak rates of a GPU without sparsity, and its memory."""

    bf16_tflops: float
    """Tensor cores, sums in float32."""
    fp32_tflops: float
    """Without tensor cores."""
    fp8_tflops: float | None
    """Tensor cores, sums in float32; None: the GPU has no FP8."""
    gb_per_s: float
    """10^9 bytes a second of memory."""
    memory_gib: float
    """As in the product's name. Programs can use a few per cent less."""
    capability: tuple[int, int]
    """Compute capability, by NVIDIA's table "CUDA GPU Compute Capability", our reading."""

    def tflops(self, products: Products) -> float | None:
        """Peak 10^12 FLOP/s of a format; None where the GPU does not have it."""
        return {"bf16": self.bf16_tflops, "fp32": self.fp32_tflops, "fp8": self.fp8_tflops}[products]


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    flops: float
    """FLOP/s of matrix products."""
    bytes: float
    """Bytes/s that passes over memory read and write."""

    def product(self, flops: float, moved: float) -> float:
        """Seconds of a matrix product: arithmetic and memory work at the same time, so the slower one counts."""
        return max(flops / self.flops, moved / self.bytes)


FLOPS_ALONE = Rates(1.0, math.inf)
"""For a device of unknown rates: times are FLOPs, and memory costs nothing."""


def reached(tflops: float, gb_per_s: float) -> Rates:
    """What to count on, from peak 10^12 FLOP/s and peak 10^9 bytes/s."""
    return Rates(REACHED_FLOPS * tflops * 1e12, REACHED_BYTES * gb_per_s * 1e9)


def _ampere(bf16: float, fp32: float, gb_per_s: float, memory_gib: float, capability: tuple[int, int] = (8, 0)) -> Card:
    return Card(
        bf16_tflops=bf16, fp32_tflops=fp32, fp8_tflops=None, gb_per_s=gb_per_s, memory_gib=memory_gib, capability=capability
    )


def _with_fp8(
    bf16: float, fp32: float, gb_per_s: float, memory_gib: float, fp8: float | None = None, capability: tuple[int, int] = (9, 0)
) -> Card:
    """A card whose FP8 products are twice as fast as bfloat16's, unless `fp8` says otherwise."""
    return Card(
        bf16_tflops=bf16,
        fp32_tflops=fp32,
        fp8_tflops=fp8 or 2 * bf16,
        gb_per_s=gb_per_s,
        memory_gib=memory_gib,
        capability=capability,
    )


CARDS = {
    # NVIDIA A100 Tensor Core GPU data sheet: 312 / 19.5 TFLOPS, 1,555, 2,039 and 1,935 GB/s.
    "NVIDIA A100-SXM4-40GB": _ampere(312, 19.5, 1555, 40),
    "NVIDIA A100-PCIE-40GB": _ampere(312, 19.5, 1555, 40),
    "NVIDIA A100-SXM4-80GB": _ampere(312, 19.5, 2039, 80),
    "NVIDIA A100 80GB PCIe": _ampere(312, 19.5, 1935, 80),
    # NVIDIA A40 data sheet: 149.7 | 299.4 TFLOPS without | with sparsity, BF16 with FP32 accumulate.
    "NVIDIA A40": _ampere(149.7, 37.4, 696, 48, capability=(8, 6)),
    # NVIDIA A10, A30 and RTX A6000 data sheets, our reading; half of the tensor rates "with sparsity".
    "NVIDIA A10": _ampere(125, 31.2, 600, 24, capability=(8, 6)),
    "NVIDIA A30": _ampere(165, 10.3, 933, 24),
    "NVIDIA RTX A6000": _ampere(154.8, 38.7, 768, 48, capability=(8, 6)),
    # NVIDIA Ampere GA102 whitepaper, appendix A, our reading: BF16 with FP32 accumulate.
    "NVIDIA GeForce RTX 3090": _ampere(71, 35.6, 936, 24, capability=(8, 6)),
    # NVIDIA Ada GPU architecture whitepaper, appendix A, our reading: BF16 with FP32 accumulate, FP8 with FP32 accumulate.
    "NVIDIA GeForce RTX 4090": _with_fp8(165.2, 82.6, 1008, 24, capability=(8, 9)),
    # NVIDIA L4 data sheet: 242 and 485 TFLOPS of BF16 and FP8 with sparsity.
    "NVIDIA L4": _with_fp8(121, 30.3, 300, 24, fp8=242.5, capability=(8, 9)),
    # NVIDIA L40 and L40S data sheets, without | with sparsity: BF16 181.05 | 362.1 and 362.05 | 733, FP8 362 | 724 and 733 | 1,466.
    "NVIDIA L40": _with_fp8(181.05, 90.5, 864, 48, fp8=362, capability=(8, 9)),
    "NVIDIA L40S": _with_fp8(362.05, 91.6, 864, 48, fp8=733, capability=(8, 9)),
    # NVIDIA RTX 6000 Ada data sheet, our reading; half of the tensor rate "with sparsity".
    "NVIDIA RTX 6000 Ada Generation": _with_fp8(364, 91.1, 960, 48, capability=(8, 9)),
    # NVIDIA H100 data sheet, SXM and PCIe: 1,979 and 1,513 TFLOPS with sparsity, 67 and 51 of FP32, 3,350 and 2,000 GB/s.
    "NVIDIA H100 80GB HBM3": _with_fp8(989.5, 67, 3350, 80),
    "NVIDIA H100 PCIe": _with_fp8(756.5, 51, 2000, 80),
    # NVIDIA H100 NVL data sheet, our reading: 1,671 TFLOPS with sparsity.
    "NVIDIA H100 NVL": _with_fp8(835.5, 60, 3900, 94),
    # NVIDIA H200 data sheet, SXM: 1,979 TFLOPS with sparsity, 4.8 TB/s. NVL, our reading: 1,671 TFLOPS with sparsity.
    "NVIDIA H200": _with_fp8(989.5, 67, 4800, 141),
    "NVIDIA H200 NVL": _with_fp8(835.5, 60, 4800, 141),
    # NVIDIA GH200 data sheet, our reading: the H100 with 96 GB of HBM3 at 4 TB/s. The name counts the CPU's memory.
    "NVIDIA GH200 480GB": _with_fp8(989.5, 67, 4000, 96),
    # NVIDIA Blackwell data sheet, a GPU of HGX B200: 4.5 PFLOPS of BF16 with sparsity, 75 TFLOPS of FP32, 180 GB at 7.7 TB/s. That of
    # DGX B200 gives 64 TB/s for eight of them.
    "NVIDIA B200": _with_fp8(2250, 75, 7700, 180, capability=(10, 0)),
    # The same data sheet, a GPU of GB200 NVL72: 5 PFLOPS of BF16 with sparsity, 80 TFLOPS of FP32, 186 GB at 8 TB/s.
    "NVIDIA GB200": _with_fp8(2500, 80, 8000, 186, capability=(10, 0)),
}  # fmt: skip

SHORT_NAMES = {
    "a100-40": "NVIDIA A100-SXM4-40GB",
    "a100-80": "NVIDIA A100-SXM4-80GB",
    "a40-48": "NVIDIA A40",
    "a30-24": "NVIDIA A30",
    "l4-24": "NVIDIA L4",
    "l40s-48": "NVIDIA L40S",
    "h100-80": "NVIDIA H100 80GB HBM3",
    "h100-94": "NVIDIA H100 NVL",
    "gh200-96": "NVIDIA GH200 480GB",
    "h200-141": "NVIDIA H200",
    "b200-180": "NVIDIA B200",
    "gb200-186": "NVIDIA GB200",
}
"""{a name for flags, model and GiB: the driver's name}."""


def card_named(device_name: str) -> Card | None:
    """The GPU of that name, as `torch.cuda.get_device_name` gives it; None where the table does not have it."""
    return CARDS.get(device_name.strip())


def peak_tflops(device_name: str | None, products: Products, given: float | None) -> float | None:
    """Peak 10^12 FLOP/s of a device in a format, without sparsity; None where nobody knows it.

    device_name: of a GPU; None: a CPU. given: in place of the table, of bf16 or fp32; FP8 counts as twice."""
    if given is not None:
        return given * (2 if products == "fp8" else 1)
    card = None if device_name is None else card_named(device_name)
    return None if card is None else card.tflops(products)
