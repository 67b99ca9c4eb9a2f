"""The loss by which a checkpoint's weights are recognised later: see data/reference_batch.py."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch

from megatron_salt.data.reference_batch import fixed_batch, prefix_lengths
from megatron_salt.model.fp8_teacher import in_bfloat16
from megatron_salt.model.loss import METRICS
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.pipeline import run_pipeline
from megatron_salt.train.evaluate import sums_over_replicas
from megatron_salt.train.step import Student, forward_input, forward_step, unwrap


@torch.no_grad()
def probe(student: Student, vocabulary_size: int) -> dict[str, Any]:
    """The model's losses on the fixed batch, as JSON values for `Checkpointer.save`. Collective over all ranks, the same on all.

    "lengths": positions that each microbatch counts, ascending, the last being the run's context; "losses": mean cross entropy of
    each, None where it is not finite; "dtype": "float32" or "bfloat16", what it was computed in, whatever the student trains in.
    Changes nothing of the student, whose every data-parallel replica computes the same. `vocabulary_size`: ids of the tokenizer.
    """
    mesh, length = student.mesh, student.seq_length
    lengths = prefix_lengths(length)
    batch = fixed_batch(vocabulary_size, length, lengths, multiple_of=mesh.layout.pipeline if len(student.chunks) > 1 else 1)
    for chunk in student.chunks:
        chunk.eval()
    inputs = [forward_input(microbatch, mesh) for microbatch in batch]
    with ExitStack() as stack:
        for chunk in student.chunks:
            stack.enter_context(in_bfloat16(unwrap(chunk)))
        metrics = run_pipeline(student.chunks, forward_step, inputs, mesh, length, 1, forward_only=True)
    for chunk in student.chunks:
        chunk.train()
    sums = torch.zeros(len(lengths), len(METRICS), dtype=torch.float64, device=current_device())
    if metrics:  # on the last stage
        sums += torch.stack(metrics[: len(lengths)])
    sums = sums_over_replicas(sums, mesh)
    losses = (sums[:, METRICS.index("loss")] / sums[:, METRICS.index("tokens")]).tolist()
    dtype = str(next(student.chunks[0].parameters()).dtype).removeprefix("torch.")
    return {"lengths": lengths, "losses": [loss if math.isfinite(loss) else None for loss in losses], "dtype": dtype}
