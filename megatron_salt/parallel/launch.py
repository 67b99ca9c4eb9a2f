"""Start and end of torch.distributed, the device of this rank, and its random seeds. NCCL with a GPU, gloo without.

Works under torchrun, or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. If none of these is
set, it starts a single process. rendezvous.py names the ranks that did not join, failure.py reports the rank that failed.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state, tensor_parallel

from megatron_salt.config.parallel import Device
from megatron_salt.errors import MachineError, UserError, this_host
from megatron_salt.parallel.failure import watching
from megatron_salt.parallel.hardware import CONNECTIONS, Hardware, dotted, release
from megatron_salt.parallel.launch_store import launch_from_environment
from megatron_salt.parallel.machine import naming_faults, no_gpu, refuse_dead_gpus, refuse_software
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.rendezvous import Backend, RankDevice, meet, no_reason

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)


def find_hardware(device: Device = "auto") -> Hardware:
    """Bind this rank's GPU, and return the hardware and versions that this process sees. Not collective. Raises as `bind_device`."""
    capability = torch.cuda.get_device_capability() if bind_device(device) else None
    cuda = None if torch.version.cuda is None else release(torch.version.cuda)
    try:
        engine = release(importlib.metadata.version("transformer_engine"))
    except importlib.metadata.PackageNotFoundError:
        engine = None
    return Hardware(capability, cuda, engine)


def bind_device(device: Device = "auto") -> bool:
    """Make a GPU this process's device: number LOCAL_RANK, or the only one that is shown (Slurm's --gpus-per-task). False on the CPU.

    device: "cuda" never falls back to the CPU. Not collective. Raises MachineError where another host would do: no GPU, too few, one
    that cannot be initialised, or software that does not fit. Raises UserError where it would not.
    """
    if not torch.cuda.is_available():
        if device == "cuda":
            raise no_gpu()
        if device == "auto":
            refuse_dead_gpus()
        return False
    if device == "cpu":
        raise UserError("--device cpu: this process has found its GPUs already; start it with CUDA_VISIBLE_DEVICES= instead")
    refuse_software()
    local_rank, shown = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    number = 0 if shown == 1 else local_rank
    if number >= shown:
        raise MachineError(
            this_host(),
            f"LOCAL_RANK is {local_rank} but it shows {shown} GPUs: one is missing, or too many ranks were started there",
        )
    with naming_faults(f"CUDA device {number} of {shown} cannot be initialised", everything=True):
        torch.cuda.set_device(number)
        torch.cuda.synchronize()  # makes the context, if set_device has not: a dead GPU is found here
    # A product whose sum is split over thread blocks adds the parts in float32, as the output head's bounds suppose, not in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return True


def choose_deterministic_operations() -> str:
    """On a GPU let torch and megatron-core take operations that give the same bits each time; an operation without such a form raises
    at its call. Returns a line for the log. See also hardware.ask_for_determinism."""
    if not torch.cuda.is_available():
        return "--deterministic changes nothing on a CPU, where every operation is"
    torch.use_deterministic_algorithms(True)
    return "--deterministic: of each operation the form that gives the same bits each time"


def only_gpu() -> str | None:
    """Identity of the GPU of a process that is shown a single one; None where it is shown several, which LOCAL_RANK tells apart."""
    return str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.device_count() == 1 else None


def describe(hardware: Hardware) -> str:
    """One line for the log: device, communication library and versions. Call it inside `distributed`."""
    if hardware.capability is None:
        return f"on the CPU: {dist.get_backend()}, torch {torch.__version__}"
    engine = (
        "no Transformer Engine"
        if hardware.transformer_engine is None
        else f"Transformer Engine {dotted(hardware.transformer_engine)}"
    )
    return (
        f"on {torch.cuda.get_device_name()} (compute capability {dotted(hardware.capability)}), one a rank: "
        f"{dist.get_backend()} {dotted(torch.cuda.nccl.version())}, torch {torch.__version__}, {engine}, "
        f"{CONNECTIONS} {os.environ.get(CONNECTIONS, 'unset')}; batches come through pinned memory"
    )


@contextmanager
def distributed(
    timeout: timedelta, rendezvous_timeout: timedelta = RENDEZVOUS_TIMEOUT, leaving: Callable[[], str | None] = no_reason,
    device: Device = "auto",
) -> Iterator[None]:  # fmt: skip
    """Bind this rank's device, join the other ranks, and leave them at the end. Collective over all ranks.

    A collective that waits longer than `timeout` fails. The start fails if a rank has not joined after `rendezvous_timeout`
    (LostRankError), if `leaving` returns a reason to stop waiting (LeftEarly), or if some ranks have a GPU and others none (MachineError).
    Inside the block the failure of another rank ends this process; `fail_together` reports a failure of this rank. A GPU that fails there
    raises MachineError.
    """
    on_gpu = bind_device(device)
    backend: Backend = "nccl" if on_gpu else "gloo"
    launch = launch_from_environment()
    if launch is None and "RANK" in os.environ:
        raise UserError(
            "RANK is set, but not all of WORLD_SIZE, MASTER_ADDR and MASTER_PORT: start with torchrun, or set them too"
        )
    with ExitStack() as held:
        if launch is None:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        else:
            own = RankDevice(
                rank=launch.rank, host=this_host(), asked=device, backend=backend, gpu=only_gpu() if on_gpu else None
            )
            connection = meet(launch, rendezvous_timeout, own, leaving)
            held.callback(connection.close)
            held.enter_context(watching(launch))
            connection.store.set_timeout(timeout)
            # torchrun's store outlives a run: a second one in the same processes must not read the addresses of the first.
            start = connection.store.add(f"starts/{launch.rank}", 1)
            dist.init_process_group(  # without device_id, see mesh.new_group_of
                backend,
                timeout=timeout,
                store=dist.PrefixStore(f"world/{start}", connection.store),
                rank=launch.rank,
                world_size=launch.world_size,
            )
        with naming_faults("a GPU failed"):
            yield
            dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def seed_everything(seed: int, mesh: Mesh) -> None:
    """Seed initial weights and dropout as Megatron-LM does: by pipeline stage, and in the model-parallel tracker by tp rank."""
    stage_seed = seed + 100 * mesh.at.pp
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
