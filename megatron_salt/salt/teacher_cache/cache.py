"""A run's use of a cache of hidden states: opened at the start, read ahead of each step, and added to while the teacher computes.

Stored are last hidden states, exact, in the dtype in which the teacher hands them out: h_t x 2 bytes a token in bfloat16. A teacher of
1.5B (h_t = 2048) has 4 KiB a token, where its logits over 256,000 ids would take 500 KiB in bfloat16. Targets sampled from its
distribution would be smaller still, some 200 bytes for 50 ids. But they are noise that the live teacher does not have, they are made for
one temperature, and they need another head. Hidden states go through the same head as the live teacher's, so curves are equal bit for bit,
for every weight and temperature.

What the cache holds is decided once, at the start, for all ranks: they list the same shards. So all ranks of a block know of each sample
whether the teacher computes it, and none waits for another in vain. Samples that come later, from this run or others, serve later runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_salt.data.batch import Batches, CachedHidden, Microbatch
from megatron_salt.errors import UserError
from megatron_salt.parallel.collectives import first_problem, from_rank_0, gathered
from megatron_salt.parallel.device import host_buffer
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.salt.routing import received_positions
from megatron_salt.salt.teacher_cache.manifest import (
    CacheManifest,
    claim,
    held_out_path,
    read_held_out,
    write_held_out,
)  # fmt: skip
from megatron_salt.salt.teacher_cache.missing import num_computed
from megatron_salt.salt.teacher_cache.shards import Index, SampleShape, open_shard, shard_names
from megatron_salt.salt.teacher_cache.writer import CacheWriter, as_bits

log = logging.getLogger(__name__)

LOOKED_UP = 1 << 20  # samples at a time


@dataclass(frozen=True, kw_only=True)
class StepUse:
    """What a step took from the cache, and what the teacher computed; shares of the samples of the global batch."""

    cached: float
    computed: float
    """With the samples that fill the last forward pass of a replica."""


@dataclass(frozen=True, kw_only=True)
class CacheTotals:
    """What a run did with its cache, over all ranks."""

    steps: int = 0
    """Steps of stage 1."""
    samples_cached: int = 0
    """Samples of these steps whose hidden states the cache held."""
    samples_written: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds_reading: float = 0.0
    """Of the threads that read, summed over ranks; the training waits for them only where they are slower than a step."""
    seconds_writing: float = 0.0
    """Of the threads that write, summed over ranks."""


class TeacherCache:
    """One run's use of a cache. `index` never changes; the totals do. Every rank has one."""

    def __init__(
        self,
        directory: Path,
        index: Index,
        student: Mesh,
        *,
        stages: frozenset[int],
        writes: bool,
        forward_samples: int,
        held_out: dict[str, float] | None = None,
        held_out_file: Path | None = None,
    ) -> None:
        """stages: pipeline stages of the student that use hidden states. forward_samples: of one forward pass of the teacher. held_out: the
        teacher's figures on the run's held-out data. held_out_file: where to write them; None: nowhere."""
        self.directory, self.index, self._student, self._forward_samples = directory, index, student, forward_samples
        self.held_out, self._held_out_file = held_out, held_out_file
        self._writer = CacheWriter(directory, index) if writes else None
        shape, layout, at = index.shape, student.layout, student.at
        self._slices = received_positions(layout, shape.seq_length, at.cp, at.tp) if at.pp in stages else None
        self._steps, self._samples_cached, self._bytes_read, self._seconds_reading = 0, 0, 0, 0.0

    def add_cached(self, microbatches: list[Microbatch]) -> list[Microbatch]:
        """The microbatches of a step of this replica with what the cache holds of them, or as they are where it holds nothing. Called in
        the thread that reads data. Raises UserError for a damaged shard."""
        started = time.perf_counter()
        present = [self.index.has(microbatch.sample_ids) for microbatch in microbatches]
        if not any(one.any() for one in present):
            return microbatches
        added = [
            replace(one, cached=CachedHidden(has, self._read(one.sample_ids, has)))
            for one, has in zip(microbatches, present, strict=True)
        ]
        self._seconds_reading += time.perf_counter() - started
        return added

    def use_of_step(self, train: Batches, consumed: int, global_batch_size: int) -> StepUse:
        """What the step that follows after `consumed` samples takes from the cache, over all replicas. The same on every rank."""
        present = self.index.has(train.sample_ids(consumed, global_batch_size))
        self._steps += 1
        self._samples_cached += int(present.sum())
        computed = num_computed(present, self._student.layout.data, self._forward_samples)
        return StepUse(cached=float(present.mean()), computed=computed / global_batch_size)

    def holds(self, train: Batches, consumed: int, end: int) -> bool:
        """Whether it holds every sample between two consumed counts. The same on every rank; nothing is read."""
        if not len(self.index):
            return consumed >= end
        return all(
            self.index.has(train.sample_ids(first, min(LOOKED_UP, end - first))).all()
            for first in range(consumed, end, LOOKED_UP)
        )

    @property
    def keep(self) -> Callable[[np.ndarray, Tensor], None] | None:
        """Takes what the teacher computed, see `Teacher.hidden_states`; None where this run does not write."""
        return None if self._writer is None else self._writer.keep

    def keep_held_out(self, figures: Mapping[str, float]) -> None:
        """Keep the teacher's figures on the held-out data for other runs. Rank 0 writes; an error of the disk is logged."""
        if self._held_out_file is None or self.held_out is not None or torch.distributed.get_rank() != 0:
            return
        try:
            write_held_out(self._held_out_file, figures)
        except OSError as error:
            log.warning("%s cannot be written (%s); other runs evaluate the teacher again", self._held_out_file, error.strerror)

    def finish(self) -> CacheTotals:
        """Write what is left. Returns the totals of this start over all ranks, the same on all. Collective over all ranks."""
        if self._writer is not None:
            self._writer.finish()
        writer = self._writer
        mine = CacheTotals(
            steps=self._steps,
            samples_cached=self._samples_cached,
            samples_written=0 if writer is None else writer.num_samples,
            bytes_read=self._bytes_read,
            bytes_written=0 if writer is None else writer.num_bytes,
            seconds_reading=self._seconds_reading,
            seconds_writing=0.0 if writer is None else writer.seconds,
        )
        everyone = gathered(asdict(mine))
        summed = {each.name: sum(one[each.name] for one in everyone) for each in fields(CacheTotals)}
        return CacheTotals(**(summed | {"steps": mine.steps, "samples_cached": mine.samples_cached}))

    def _read(self, ids: np.ndarray, present: np.ndarray) -> Tensor | None:
        """[s/(cp*tp), b, h_t], undefined where a sample is not present; None on ranks that use no hidden states."""
        if self._slices is None:
            return None
        shape = self.index.shape
        positions = sum(one.stop - one.start for one in self._slices)
        hidden = host_buffer((positions, len(ids), shape.hidden_size), getattr(torch, shape.dtype))
        out = as_bits(hidden, shape).transpose(1, 0, 2)
        found = np.empty((int(present.sum()), positions, shape.hidden_size), shape.numpy_dtype)
        self._bytes_read += self.index.read(ids[present], self._slices, found)
        out[present] = found
        return hidden


def open_cache(
    directory: Path, manifest: Callable[[], CacheManifest], student: Mesh, *, stages: frozenset[int], forward_samples: int,
    held_out: Callable[[], dict[str, Any]], sets: Sequence[str],
) -> TeacherCache:  # fmt: skip
    """Open a cache, or make one. Collective over all ranks. Raises UserError on every rank: for a cache of something else, and for damage.

    manifest, held_out: called on rank 0; what the run is, and its held-out data. sets: names of the held-out sets; empty where the run does
    not evaluate. stages: of the student, those that use hidden states. forward_samples: of one forward pass of the teacher.
    """

    def on_rank_0() -> tuple[CacheManifest, list[str], list[str], Path | None, dict[str, float] | None]:
        mine = manifest()
        found = claim(directory, mine)
        path = held_out_path(directory, held_out()) if sets else None
        return (
            found,
            found.rounding_differences(mine),
            shard_names(directory),
            path,
            None if path is None else read_held_out(path, ("loss", "accuracy")),
        )

    found, differences, names, path, figures = from_rank_0(on_rank_0)
    shape, shards, problem = SampleShape(found.seq_length, found.hidden_size, found.dtype, found.key), [], None
    try:
        shards = [open_shard(directory / name, shape) for name in names]
    except UserError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise UserError(problem)
    index = Index(shards, shape)
    log.info(
        "teacher cache %s: it holds %d samples of %d KiB",
        directory,
        len(index),
        -(-shape.num_bytes // 1024),
    )
    if differences:
        log.warning(
            "teacher cache %s: its hidden states are this run's up to rounding, so curves are not equal bit for bit (%s); this run reads "
            "them and adds none of its own",
            directory,
            "; ".join(differences),
        )
    return TeacherCache(
        directory, index, student, stages=stages, writes=not differences, forward_samples=forward_samples, held_out=figures,
        held_out_file=None if differences else path,
    )  # fmt: skip


def cache_line(totals: CacheTotals, global_batch_size: int) -> str:
    """What the log says of a run's use of its cache."""
    samples = totals.steps * global_batch_size
    share = totals.samples_cached / samples if samples else 0.0
    return (
        f"teacher cache: {share:.1%} of the {samples} samples of {totals.steps} steps came from it ({totals.bytes_read / 2**20:.1f} MiB "
        f"in {totals.seconds_reading:.2f} s); {totals.samples_written} samples were added ({totals.bytes_written / 2**20:.1f} MiB in "
        f"{totals.seconds_writing:.2f} s)"
    )
