"""Stage: what this machine is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import torch

from megatron_salt.parallel.hardware import GIB
from tests.gpu.stages.runner import Report, Setting

PACKAGES = ("torch", "triton", "megatron-core", "transformer_engine", "liger_kernel", "numpy", "tyro", "msgspec")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def describe(setting: Setting, report: Report) -> None:
    """Versions, the GPU and its memory."""
    report.note(
        python=platform.python_version(), system=platform.platform(), cores=os.cpu_count(), cuda=torch.version.cuda or "none"
    )
    report.note(**{name: version_of(name) for name in PACKAGES})
    if not setting.timed:
        report.note(device=f"{setting.device}, not a GPU: no time or memory here says anything about one")
        return
    free, total = torch.cuda.mem_get_info()
    report.note(
        device=torch.cuda.get_device_name(), capability=".".join(map(str, torch.cuda.get_device_capability())),
        gpus=torch.cuda.device_count(), free_gib=free / GIB, total_gib=total / GIB, nccl=".".join(map(str, torch.cuda.nccl.version())),
        cudnn=torch.backends.cudnn.version(),
    )  # fmt: skip
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    report.note(nvidia_smi=asked.stdout.strip() or asked.stderr.strip())


def version_of(package: str) -> str:
    """Its release, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
