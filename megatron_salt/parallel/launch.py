"""torch.distributed up and down, the device of this rank, and its random seeds.

Works under torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and, with none of these
set, as a single process.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu  # noqa: F401  (before megatron)
from megatron.core import parallel_state, tensor_parallel

from megatron_salt.errors import UserError
from megatron_salt.parallel.mesh import Mesh


@contextmanager
def distributed(timeout: timedelta) -> Iterator[None]:
    """Bind this rank's device, join the world, and leave it at the end. Collective over all ranks.

    NCCL with a GPU, gloo without. A collective that waits longer than `timeout` fails. After an exception the group is left
    without a word to the others, who may be waiting in a collective: the launcher ends them.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            shown = torch.cuda.device_count()
            raise UserError(f"LOCAL_RANK is {local_rank} but this node shows {shown} GPUs; start at most that many ranks a node")
        torch.cuda.set_device(local_rank)
        backend = "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def seed_everything(seed: int, mesh: Mesh) -> None:
    """Seed initial weights and dropout as Megatron does: by pipeline stage, and inside the model-parallel tracker by tp rank."""
    stage_seed = seed + 100 * mesh.at.pp
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
