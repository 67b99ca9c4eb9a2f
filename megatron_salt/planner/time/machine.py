"""What a plan takes the machine to do in a second: products, memory, links between GPUs. Pure.

Peaks are those of data sheets (`cards.py`). Which part of them is reached is our choice, or --mfu.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_salt.cards import Products, Rates, peak_tflops
from megatron_salt.config import LoggingConfig
from megatron_salt.errors import UserError
from megatron_salt.planner.planned_run import PlannedRun
from megatron_salt.salt.cost import ModelRates, rates_of_gpu

PCIE_4, PCIE_5 = 32.0, 64.0
NVLINK_GBS = {
    # Half of what data sheets give for NVLink: they add both directions. 600 GB/s of an A100, 900 of an H100 and H200, 1,800 of a B200.
    "NVIDIA A100-SXM4-40GB": 300.0,
    "NVIDIA A100-SXM4-80GB": 300.0,
    "NVIDIA H100 80GB HBM3": 450.0,
    "NVIDIA H200": 450.0,
    "NVIDIA GH200 480GB": 450.0,
    "NVIDIA B200": 900.0,
    "NVIDIA GB200": 900.0,
    # PCI Express 5.0, 16 lanes; all other cards: 4.0.
    "NVIDIA H100 PCIe": PCIE_5,
    "NVIDIA H100 NVL": PCIE_5,
    "NVIDIA H200 NVL": PCIE_5,
}
"""10^9 bytes/s from one GPU to others of its node, in one direction, by the driver's name. Bridges between two cards are left out."""
NETWORK_GBS = 50.0
"""10^9 bytes/s between nodes for each GPU, in one direction: a port of 400 Gbit/s for each GPU, as the data sheet of DGX H100 has."""
REACHED_LINKS = 0.8
"""Part of a link's speed that large transfers reach. Our choice; nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one GPU and of its links."""

    rates: ModelRates
    peak_flops: float
    """FLOP/s of the student's layers at their peak, for the MFU"""
    in_node: float
    """Bytes/s of a GPU to GPUs of its node"""
    between_nodes: float
    """Bytes/s of a GPU to those of other nodes"""
    gpus_per_node: int
    stated: str
    """The figures above, for the report"""

    def link(self, ranks: list[int]) -> float:
        """Bytes/s among ranks: the network's where they are on several nodes. Node n has the ranks from n x --gpus-per-node on."""
        return self.in_node if len({rank // self.gpus_per_node for rank in ranks}) == 1 else self.between_nodes


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """What flags say of the machine."""

    gpu: str
    """The driver's name"""
    mfu: float | None
    nvlink_gbs: float | None
    network_gbs: float | None
    gpus_per_node: int

    def __post_init__(self) -> None:
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise UserError(f"--mfu must be above 0 and at most 1, got {self.mfu}")
        for flag, given in (("--nvlink-gbs", self.nvlink_gbs), ("--network-gbs", self.network_gbs)):
            if given is not None and not 0 < given < math.inf:
                raise UserError(f"{flag} must be above 0, got {given}")
        if self.gpus_per_node < 1:
            raise UserError(f"--gpus-per-node must be at least 1, got {self.gpus_per_node}")


def machine_of(flags: MachineFlags, run: PlannedRun) -> Machine | None:
    """The machine of a run; None where nobody knows the peaks of its GPU (--device-peak-tflops and --device-peak-gb-per-s tell)."""
    logging = run.config.logging
    own: Products = "bf16" if run.config.training.bf16 else "fp32"
    student: Products = "fp8" if run.precision.quantized else own
    taught: Products = "fp8" if run.teacher is not None and run.teacher.precision.quantized else own
    if flags.mfu is None:
        rates: ModelRates | None = rates_of_gpu(flags.gpu, logging, student, taught, run.itemsize)
    else:
        rates = _rates_by_mfu(flags.gpu, logging, (own, student, taught), flags.mfu)
    peak = peak_tflops(flags.gpu, student, logging.device_peak_tflops)
    if rates is None or not rates.known or peak is None:
        return None
    nvlink = NVLINK_GBS.get(flags.gpu, PCIE_4) if flags.nvlink_gbs is None else flags.nvlink_gbs
    network = NETWORK_GBS if flags.network_gbs is None else flags.network_gbs
    stated = (
        f"{rates.source}; {REACHED_LINKS:g} of {nvlink:g} GB/s in a node of {flags.gpus_per_node} GPUs and of {network:g} GB/s a GPU "
        "between nodes"
    )
    return Machine(
        rates=rates, peak_flops=peak * 1e12, in_node=REACHED_LINKS * nvlink * 1e9, between_nodes=REACHED_LINKS * network * 1e9,
        gpus_per_node=flags.gpus_per_node, stated=stated,
    )  # fmt: skip


def _rates_by_mfu(
    gpu: str, logging: LoggingConfig, products: tuple[Products, Products, Products], mfu: float
) -> ModelRates | None:
    """Peaks times `mfu`, which then holds passes over memory too; None where a peak is not known."""
    peaks = [peak_tflops(gpu, one, logging.device_peak_tflops) for one in products]
    if None in peaks:
        return None
    own, student, taught = (Rates(mfu * (peak or 0.0) * 1e12, math.inf) for peak in peaks)
    named = dict(zip(products, peaks, strict=True))
    figures = ", ".join(f"{peak:g} TFLOP/s in {name}" for name, peak in named.items())
    return ModelRates(
        layers=student, head=own, teacher_layers=taught, teacher_head=own, source=f"{gpu}: --mfu {mfu:g} of {figures}"
    )
