"""Watching for numbers that are not finite: gradients in a step, parameters and the optimizer's state before a save, the loss at the end.

Whatever ends a run here is a NonFiniteError on every rank. It names the newest checkpoint, which is good: nothing that is not finite
is ever saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from megatron_salt.checkpoint.compatibility import read_facts
from megatron_salt.config import CheckpointConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.errors import NonFiniteError, UserError
from megatron_salt.model.loss import METRICS
from megatron_salt.parallel.collectives import from_rank_0, largest
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.train.step import StepOutcome, Student

SHOWN = 3  # names of tensors in a message

WayOut = Callable[[int], str]
"""From the number of the last steps that were not finite to what a message ends with. Collective over all ranks."""


def no_way_out(bad_steps: int) -> str:
    """Nothing to add."""
    return ""


class NonFiniteWatch:
    """Counts steps in a row that were not applied; the limit-th ends the run. The count is the same on every rank."""

    def __init__(self, limit: int, in_a_row: int) -> None:
        self.limit, self.in_a_row = limit, in_a_row

    def note(
        self, step: int, outcome: StepOutcome, microbatches: Sequence[Microbatch], mesh: Mesh, way_out: WayOut = no_way_out
    ) -> None:
        """Take note of a step. Collective over all ranks in the step that ends the run, when it raises NonFiniteError on all of them;
        only then are the microbatches' losses read from the device."""
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
        """Take note of the loss of the run's last step, which counts though its gradient was finite. Collective over all ranks."""
        bad = outcome.sums is not None and not bool(outcome.sums[:, METRICS.index("loss")].isfinite().all())
        if largest(int(bad)):
            self.in_a_row = max(self.in_a_row, 1)

    def refuse_end(self, step: int, way_out: WayOut) -> None:
        """Raise NonFiniteError where the run's last steps were not finite, as `note`, `note_last` or a checkpoint say. Collective."""
        if self.in_a_row:
            raise NonFiniteError(
                f"loss or gradient norm was not finite in the last steps of the run, {self.in_a_row} of them up to step "
                f"{step}. Parameters are those of step {step - self.in_a_row}{way_out(self.in_a_row)}"
            )


def refuse_nonfinite(student: Student, step: int, way_out: WayOut) -> None:
    """Raise NonFiniteError where, on any rank, a parameter or a part of the optimizer's state is not finite. Collective over all ranks."""
    tensors = dict(_tensors(student))
    peaks = torch._foreach_norm(list(tensors.values()), math.inf) if tensors else ()  # cannot overflow, unlike a sum
    bad = bool(peaks) and not bool(torch.stack([peak.float() for peak in peaks]).isfinite().all())
    if not largest(int(bad)):
        return
    names = [name for name, peak in zip(tensors, peaks, strict=True) if not peak.isfinite()]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, names)
    rank = next(rank for rank, found in enumerate(everyone) if found)
    found = everyone[rank]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise NonFiniteError(f"not finite after step {step}: on rank {rank} {', '.join(found[:SHOWN])}{more}{way_out(1)}")


def refuse_nonfinite_losses(probe: Mapping[str, Any], step: int, way_out: WayOut) -> None:
    """Raise NonFiniteError where a model's loss on the fixed batch (train/reference_loss.py) is not finite. Collective over all ranks."""
    if None in probe["losses"]:
        raise NonFiniteError(
            f"after step {step} the loss on a fixed batch is not finite, and so the model is not saved{way_out(1)}"
        )


def find_way_out(checkpointer: Checkpointer, checkpoint: CheckpointConfig, position: int, global_batch_size: int) -> WayOut:
    """Which checkpoint to go back to, and what can be tried from there. position: samples drawn so far.

    What it returns completes a save that is under way, and is collective over all ranks."""

    def find(bad_steps: int) -> str:
        checkpointer.finish()
        return from_rank_0(partial(_name_checkpoint, checkpoint, position, position - bad_steps * global_batch_size))

    return find


def _name_checkpoint(checkpoint: CheckpointConfig, position: int, sound: int) -> str:
    changes = "a smaller --lr, a smaller --clip-grad"
    for place in dict.fromkeys((checkpoint.save, checkpoint.load)):
        with contextlib.suppress(UserError, OSError):
            for good in [] if place is None else save_directory.candidates(Path(place), fallback=True):
                drawn = read_facts(good)["data"].get("position", 0)
                if drawn <= sound:
                    skip = f" or --skip-samples {drawn}:{position}, the samples since then" if drawn < position else ""
                    return f"; {good} stands: go on from it, --load {good}, with {changes}{skip}"
    return f"; there is no checkpoint to go back to: start anew with {changes}"


def _tensors(student: Student) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters, and its part of the optimizer's main parameters and moments, by name; empty ones left out."""
    seen: set[int] = set()
    found: list[tuple[str, Any]] = []
    for number, chunk in enumerate(student.chunks):
        prefix = f"chunk {number} " if len(student.chunks) > 1 else ""
        found += [(prefix + name.removeprefix("module."), parameter) for name, parameter in chunk.named_parameters()]
    for number, part in enumerate(student.optimizer.chained_optimizers):
        for index, tensor in enumerate(tensor for group in part.param_groups for tensor in group["params"]):
            found.append((f"main parameter {number}.{index}", tensor))
            found += [
                (f"the optimizer's {key} {number}.{index}", value)
                for key, value in part.optimizer.state.get(tensor, {}).items()
            ]
    for name, value in found:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel() or id(value) in seen:
            continue
        if not is_float8tensor(value):  # a weight in FP8 cannot say; its main parameter does
            seen.add(id(value))
            yield name, value.detach()


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
