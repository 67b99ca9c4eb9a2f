"""Watching for gradients that are not finite, and saying where they came from when they do not go away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu  # noqa: F401

from megatron_salt.data.batch import Microbatch
from megatron_salt.errors import UserError
from megatron_salt.model.head import METRICS
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.train.step import StepOutcome


class NonFiniteWatch:
    """Counts steps in a row that were not applied; the limit-th ends the run. The count is the same on every rank."""

    def __init__(self, limit: int, in_a_row: int) -> None:
        self.limit, self.in_a_row = limit, in_a_row

    def note(self, step: int, outcome: StepOutcome, microbatches: Sequence[Microbatch], mesh: Mesh) -> None:
        """Take note of a step. Collective over all ranks in the step that ends the run, when it raises UserError on all of them;
        only then are the microbatches' losses read from the device."""
        self.in_a_row = 0 if outcome.applied else self.in_a_row + 1
        if self.in_a_row < self.limit:
            return
        culprits = _culprits(outcome, microbatches, mesh)
        where = "; ".join(culprits) if culprits else "every microbatch's loss was finite, so the gradients overflowed in backward"
        raise UserError(
            f"the gradient norm was not finite in {self.in_a_row} steps in a row (--max-nonfinite-steps {self.limit}), the last one "
            f"step {step}: {where}. Parameters are those of step {step - self.in_a_row}"
        )


def _culprits(outcome: StepOutcome, microbatches: Sequence[Microbatch], mesh: Mesh) -> list[str]:
    """Where a loss was not finite, on any rank: rank, microbatch, its samples and its loss. Collective over all ranks."""
    mine = []
    if outcome.sums is not None:
        losses = outcome.sums[:, METRICS.index("loss")].cpu()
        for number in torch.nonzero(~torch.isfinite(losses)).flatten().tolist():
            samples = ", ".join(str(sample) for sample in microbatches[number].sample_ids.tolist())
            mine.append(f"rank {mesh.rank}, microbatch {number} (samples {samples}) had loss {losses[number].item()}")
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [line for lines in everyone for line in lines]
