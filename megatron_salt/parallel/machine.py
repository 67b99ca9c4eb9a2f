"""Faults of this host: no GPU, a dead one, half-installed or old software, no compiler. Each is a MachineError that names the host.

One question decides between a MachineError and a UserError: would another host do? A GPU that does not answer is the host's fault. A
torch without CUDA, or an environment that hides every GPU, is not. What is installed counts as the host's, since nodes have their own
images and disks; where all hosts share one environment, the launcher's bound on restarts ends the job. Errors of CUDA that a program
can cause by itself (illegal address, assertion, out of memory in a step) stay what they are.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import textwrap
from collections.abc import Iterator

import torch

from megatron_salt.errors import MachineError, UserError, this_host
from megatron_salt.parallel.hardware import VISIBLE, dotted, release

TORCH = (2, 10)
"""First release whose `out_dtype` of mm and addmm on CUDA does what matrix_products.py needs."""

_HARDWARE = (
    "initialization error",
    "CUDA driver version is insufficient for CUDA runtime version",
    "CUDA-capable device(s) is/are busy or unavailable",
    "no CUDA-capable device is detected",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected during the execution",
    "Invalid access of peer GPU memory over nvlink or a hardware error",
    "hardware stack error",
    "system not yet initialized",
    "system has unsupported display driver / cuda driver combination",
    "unknown error",
)
"""cudaGetErrorString of codes 3, 35, 46, 100, 214, 220, 226, 714, 802, 803 and 999 (CUDA 13.0): what no program causes by itself."""

_FAILED_STARTS = ("CUDA driver initialization failed", "CUDA unknown error", "Unexpected error from cudaGetDeviceCount")
"""How torch's message begins where there is a driver and CUDA fails to start (c10/cuda/CUDAFunctions.cpp). Not: no driver, no GPU."""


def no_gpu() -> UserError:
    """The error of a process that must compute on a GPU and sees none."""
    if torch.version.cuda is None:
        return UserError(
            f"--device cuda: torch {torch.__version__} is built without CUDA; install one for CUDA, or give --device cpu"
        )
    if (shown := os.environ.get(VISIBLE)) in ("", "-1", "NoDevFiles"):
        return UserError(
            f"--device cuda: {VISIBLE} is {shown!r} and hides every GPU; unset it, ask the launcher for GPUs, or give --device cpu"
        )
    return MachineError(
        this_host(),
        f"--device cuda, and no GPU is seen there ({VISIBLE} {'unset' if shown is None else shown}): {_why_no_cuda()}",
    )


def refuse_dead_gpus() -> None:
    """Raise MachineError if CUDA fails to start on this host, which is not the same as a host without GPUs. Call it where none is seen."""
    if torch.version.cuda is not None and (reason := _why_no_cuda()).startswith(_FAILED_STARTS):
        raise MachineError(this_host(), f"its GPUs do not start: {reason}; --device cpu runs without them")


def _why_no_cuda() -> str:
    """The first line of torch's reason for seeing no GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "torch gives no reason"


def refuse_software() -> None:
    """Raise MachineError if the software of this host cannot compute on its GPUs: an old torch, or no C compiler for fused kernels."""
    if release(torch.__version__) < TORCH:
        raise MachineError(this_host(), f"its torch is {torch.__version__}, and GPUs need {dotted(TORCH)} or later")
    if (problem := _compiler_problem()) is not None:
        raise MachineError(this_host(), f"fused kernels are compiled there at their first use, and {problem}")


def _compiler_problem() -> str | None:
    """Why Triton and torch.compile cannot build the C module that starts their kernels; None: they can.

    The same compiler and headers as triton/runtime/build.py: CC, else gcc, else clang; Python.h of this interpreter.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "it has no C compiler: install gcc, or set CC"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    command = [compiler, "-fsyntax-only", "-x", "c", f"-I{headers}", "-"]
    try:
        ended = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, check=False)
    except OSError as error:
        return f"its C compiler {compiler} does not start: {error.strerror}"
    if ended.returncode == 0:
        return None
    return f"its C compiler {compiler} cannot compile Python.h of {headers}: {(ended.stderr.splitlines() or ['no message'])[0]}"


def refuse_half_engine() -> None:
    """Raise MachineError if Transformer Engine is there in part: with it megatron-core's imports fail, or take another optimizer.

    Imports Transformer Engine where it is installed, which megatron-core does as well. torch must be imported before it.
    """
    if not importable("transformer_engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            files = importlib.metadata.distribution("transformer_engine")
            raise MachineError(
                this_host(),
                f"Transformer Engine is there in part (version {files.version} is listed as installed, and there is no package of that "
                "name): install it whole, see requirements-gpu.txt, or uninstall it",
            )
        return
    try:
        import transformer_engine
        import transformer_engine.pytorch

        transformer_engine.__version__, transformer_engine.pytorch.Linear  # noqa: B018
    except Exception as error:  # whatever its imports raise: FileNotFoundError, ImportError, OSError of a library, ...
        spec = importlib.util.find_spec("transformer_engine")
        where = next(iter(spec.submodule_search_locations or []), spec.origin) if spec is not None else None
        raise MachineError(
            this_host(),
            f"Transformer Engine is there in part ({where}; {type(error).__name__}: {_first_line(error)}): install it whole, see "
            "requirements-gpu.txt, or remove it with its folder",
        ) from error


@contextlib.contextmanager
def naming_faults(what: str, everything: bool = False) -> Iterator[None]:
    """Turn an error of the block that is the host's fault into a MachineError. what: says what failed, with the device.

    everything: any error of CUDA counts, because the block does nothing but start it.
    """
    try:
        yield
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        fault = _fault_of_hardware(str(error))
        if fault is None and everything:
            fault = _first_line(error)
        if fault is None:
            raise
        raise MachineError(this_host(), f"{what}: {fault}") from error


def _fault_of_hardware(text: str) -> str | None:
    """The line of an error's text in which torch (`CUDA error: ...`) or NCCL (`Cuda failure 214 '...'`) quotes a fault of hardware."""
    quoted = [form for words in _HARDWARE for form in (f"CUDA error: {words}", f"'{words}'")]
    return next((" ".join(line.split()) for line in text.splitlines() if any(form in line for form in quoted)), None)


def importable(module: str) -> bool:
    """Whether a module can be found, without importing it (only the package that it is in)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    return textwrap.shorten((str(error).splitlines() or [""])[0], 200, placeholder=" ...")
