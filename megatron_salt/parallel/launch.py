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

from megatron_salt.errors import UserError
from megatron_salt.parallel.failure import watching
from megatron_salt.parallel.hardware import CONNECTIONS, Hardware, dotted, release
from megatron_salt.parallel.launch_store import launch_from_environment
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.rendezvous import meet, no_reason

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)


def find_hardware() -> Hardware:
    """Bind this rank's GPU, and return the hardware and versions that this process sees. Not collective. Raises UserError."""
    capability = torch.cuda.get_device_capability() if bind_device() else None
    cuda = None if torch.version.cuda is None else release(torch.version.cuda)
    try:
        engine = release(importlib.metadata.version("transformer_engine"))
    except importlib.metadata.PackageNotFoundError:
        engine = None
    return Hardware(capability, cuda, engine)


def bind_device() -> bool:
    """Make the GPU number LOCAL_RANK this process's device. False without any GPU. Raises UserError if there are too few GPUs."""
    if not torch.cuda.is_available():
        return False
    local_rank, shown = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= shown:
        raise UserError(f"LOCAL_RANK is {local_rank} but this node shows {shown} GPUs; start at most that many ranks a node")
    torch.cuda.set_device(local_rank)
    # A product whose sum is split over thread blocks adds the parts in float32, as the output head's bounds suppose, not in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return True


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
        f"on {torch.cuda.get_device_name()} (compute capability {dotted(hardware.capability)}), one a rank by LOCAL_RANK: "
        f"{dist.get_backend()} {dotted(torch.cuda.nccl.version())}, torch {torch.__version__}, {engine}, "
        f"{CONNECTIONS} {os.environ.get(CONNECTIONS, 'unset')}; batches come through pinned memory"
    )


@contextmanager
def distributed(
    timeout: timedelta, rendezvous_timeout: timedelta = RENDEZVOUS_TIMEOUT, leaving: Callable[[], str | None] = no_reason
) -> Iterator[None]:
    """Bind this rank's device, join the other ranks, and leave them at the end. Collective over all ranks.

    A collective that waits longer than `timeout` fails. The start fails if a rank has not joined after `rendezvous_timeout`
    (LostRankError) or if `leaving` returns a reason to stop waiting (LeftEarly). Inside the block the failure of another rank ends
    this process; `fail_together` reports a failure of this rank.
    """
    backend = "nccl" if bind_device() else "gloo"
    launch = launch_from_environment()
    if launch is None and "RANK" in os.environ:
        raise UserError(
            "RANK is set, but not all of WORLD_SIZE, MASTER_ADDR and MASTER_PORT: start with torchrun, or set them too"
        )
    with ExitStack() as held:
        if launch is None:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        else:
            connection = meet(launch, rendezvous_timeout, leaving)
            held.callback(connection.close)
            held.enter_context(watching(launch))
            connection.store.set_timeout(timeout)
            dist.init_process_group(  # without device_id, see mesh.new_group_of
                backend,
                timeout=timeout,
                store=dist.PrefixStore("world", connection.store),
                rank=launch.rank,
                world_size=launch.world_size,
            )
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
