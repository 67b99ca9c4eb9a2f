"""Ends a run whose numbers are not finite: gradients in a step, parameters and optimizer state before a save, the loss at the end.

Every error here is a NonFiniteError on every rank. It names the newest checkpoint, which is finite, because nothing else is saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.fp8_utils import is_float8tensor

from megatron_salt.checkpoint import save_directory
from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.run_state import ReferenceLosses
from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.config import CheckpointConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.errors import NonFiniteError, UserError
from megatron_salt.model.loss import METRICS
from megatron_salt.parallel.collectives import from_rank_0, largest
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.train.step import StepOutcome, Student

SHOWN = 3  # names of tensors in a message

WayOut = Callable[[int], str]
"""Gets the number of last steps that were not finite; returns the end of a message. Collective over all ranks."""


def no_way_out(bad_steps: int) -> str:
    """The way out of a message that names none."""
    return ""


class NonFiniteWatch:
    """Counts steps in a row that were not applied; step number `limit` of them ends the run. The count is the same on every rank."""

    def __init__(self, limit: int, in_a_row: int) -> None:
        self.limit, self.in_a_row = limit, in_a_row

    def note(
        self, step: int, outcome: StepOutcome, microbatches: Sequence[Microbatch], mesh: Mesh, way_out: WayOut = no_way_out
    ) -> None:
        """Count a step. Raises NonFiniteError on all ranks in the step that ends the run.

        Only that step is collective, and only that step reads the microbatches' losses from the device.
        """
        self.in_a_row = 0 if outcome.applied else self.in_a_row + 1
        if self.in_a_row < self.limit:
            return
        culprits = _culprits(outcome, microbatches, mesh)
        where = (
            "; ".join(culprits) if culprits else "every microbatch's loss was finite, so the gradients overflowed in backward"
        )
        raise NonFiniteError(
            f"the gradient norm was not finite in {self.in_a_row} steps in a row (--max-nonfinite-steps {self.limit}), the last one "
            f"step {step}: {where}. Parameters are those of step {step - self.in_a_row}{way_out(self.in_a_row)}"
        )

    def note_last(self, outcome: StepOutcome) -> None:
        """Count the run's last step where its loss is not finite, even if its gradient is. Collective over all ranks."""
        bad = outcome.sums is not None and not bool(outcome.sums[:, METRICS.index("loss")].isfinite().all())
        if largest(int(bad)):
            self.in_a_row = max(self.in_a_row, 1)

    def refuse_end(self, step: int, way_out: WayOut) -> None:
        """Raise NonFiniteError where the run's last steps were not finite, by `note`, `note_last` or the checkpoint. Collective."""
        if self.in_a_row:
            raise NonFiniteError(
                f"loss or gradient norm was not finite in the last steps of the run, {self.in_a_row} of them up to step "
                f"{step}. Parameters are those of step {step - self.in_a_row}{way_out(self.in_a_row)}"
            )


def refuse_nonfinite(student: Student, step: int, way_out: WayOut) -> None:
    """Raise NonFiniteError where a parameter or a part of the optimizer state is not finite on any rank. Collective over all ranks."""
    tensors = dict(_tensors(student))
    peaks = torch._foreach_norm(list(tensors.values()), math.inf) if tensors else ()  # a maximum cannot overflow, a sum can
    bad = bool(peaks) and not bool(torch.stack([peak.float() for peak in peaks]).isfinite().all())
    if not largest(int(bad)):
        return
    names = [name for name, peak in zip(tensors, peaks, strict=True) if not peak.isfinite()]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, names)
    rank = next(rank for rank, its_names in enumerate(everyone) if its_names)
    names = everyone[rank]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise NonFiniteError(f"not finite after step {step}: on rank {rank} {', '.join(names[:SHOWN])}{more}{way_out(1)}")


def refuse_nonfinite_losses(recorded: ReferenceLosses, step: int, way_out: WayOut) -> None:
    """Raise NonFiniteError where a loss on the reference batch (evaluate.py) is not finite. Collective over all ranks."""
    if None in recorded.losses:
        raise NonFiniteError(
            f"after step {step} the loss on a fixed batch is not finite, and so the model is not saved{way_out(1)}"
        )


def find_way_out(checkpointer: Checkpointer, checkpoint: CheckpointConfig, position: int, global_batch_size: int) -> WayOut:
    """A WayOut that names a checkpoint to go back to, and what to try from there. position: samples drawn so far.

    The WayOut first completes a save that is under way.
    """

    def find(bad_steps: int) -> str:
        checkpointer.finish()
        return from_rank_0(partial(_name_checkpoint, checkpoint, position, position - bad_steps * global_batch_size))

    return find


def _name_checkpoint(checkpoint: CheckpointConfig, position: int, sound: int) -> str:
    """The end of a message, on rank 0. sound: samples that were drawn before the first bad step."""
    changes = "a smaller --lr, a smaller --clip-grad"
    for directory in dict.fromkeys((checkpoint.save, checkpoint.load)):
        with contextlib.suppress(UserError, OSError):
            for good in [] if directory is None else save_directory.candidates(Path(directory), fallback=True):
                drawn = read_state(good).run.position
                if drawn <= sound:
                    skip = f" or --skip-samples {drawn}:{position}, the samples since then" if drawn < position else ""
                    return f"; {good} stands: go on from it, --load {good}, with {changes}{skip}"
    return f"; there is no checkpoint to go back to: start anew with {changes}"


def _tensors(student: Student) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of this rank's parameters, main parameters and moments; empty ones are left out."""
    seen: set[int] = set()
    named: list[tuple[str, Any]] = []
    for number, chunk in enumerate(student.chunks):
        prefix = f"chunk {number} " if len(student.chunks) > 1 else ""
        named += [(prefix + name.removeprefix("module."), parameter) for name, parameter in chunk.named_parameters()]
    for number, part in enumerate(student.optimizer.chained_optimizers):
        for index, tensor in enumerate(tensor for group in part.param_groups for tensor in group["params"]):
            named.append((f"main parameter {number}.{index}", tensor))
            named += [
                (f"the optimizer's {key} {number}.{index}", value)
                for key, value in part.optimizer.state.get(tensor, {}).items()
            ]
    for name, value in named:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel() or id(value) in seen:
            continue
        if not is_float8tensor(value):  # a weight in FP8 cannot be checked; its main parameter is
            seen.add(id(value))
            yield name, value.detach()


def _culprits(outcome: StepOutcome, microbatches: Sequence[Microbatch], mesh: Mesh) -> list[str]:
    """A phrase for each microbatch, of any rank, whose loss was not finite: rank, samples and loss. Collective over all ranks."""
    own = []
    if outcome.sums is not None:
        losses = outcome.sums[:, METRICS.index("loss")].cpu()
        for number in torch.nonzero(~torch.isfinite(losses)).flatten().tolist():
            samples = ", ".join(str(sample) for sample in microbatches[number].sample_ids.tolist())
            own.append(f"rank {mesh.rank}, microbatch {number} (samples {samples}) had loss {losses[number].item()}")
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    return [line for lines in everyone for line in lines]
