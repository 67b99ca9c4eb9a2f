"""Checkpoints: model, optimizer, schedule, random state and position in the data, and everything needed to use them.

`iter_0000100/` holds torch_dist shards, `state.json` (everything that is no tensor), `run.yaml`, `tokenizer/` and `checksums.json`.
A crash at any byte of a save leaves the last good checkpoint (save_directory.py). A damaged checkpoint is refused before any of it is
used (integrity.py), and so is one of another run (compatibility.py). A resumed run equals an uninterrupted one, bit for bit on the CPU.
Every function here is collective over all ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_salt.checkpoint import (
    async_writer,
    compatibility,
    fp8_scales,
    integrity,
    loading,
    retention,
    rng,
    save_directory,
    sharded_state,
    state_file,
)
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.owner import Ownership
from megatron_salt.checkpoint.run_state import CheckpointState, OpenedCheckpoint, OptimizerState, ReferenceLosses, RunState
from megatron_salt.checkpoint.save_directory import RUN_YAML, TOKENIZER
from megatron_salt.config import CheckpointConfig
from megatron_salt.errors import Look, SaveError, stay
from megatron_salt.files import real_path
from megatron_salt.parallel.collectives import begin_largest, from_rank_0
from megatron_salt.parallel.mcore_compat import megatron_core_version
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A save that is being written."""

    step: int
    write: async_writer.Write
    sums: dict[str, integrity.FileSum]
    """Of the files that rank 0 wrote before the shards; empty on other ranks."""
    reshardable: bool
    started: float


class Checkpointer:
    """Saves and loads one run. Invariant: at most one save is under way, and what `latest` names is whole."""

    def __init__(
        self,
        config: CheckpointConfig,
        identity: RunIdentity,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None,
        scheduler: OptimizerParamScheduler | None,
        owner: Ownership | None = None,
    ) -> None:
        """chunks: this rank's model chunks, bare or wrapped. owner: rank 0's lock on --save; None on other ranks, and where no other
        run can write there. Raises UserError where --save cannot be written."""
        self._config, self._identity, self._tokenizer, self._mesh = config, identity, tokenizer, mesh
        self._chunks, self._optimizer, self._scheduler = list(chunks), optimizer, scheduler
        self._save = None if config.save is None else Path(config.save)
        self._owner = owner
        self._lineage = retention.fresh()  # `load` may replace it; only rank 0's is written
        self._queue = AsyncCallsQueue()
        self._pending: _Pending | None = None
        self._still_writing: Callable[[], int] | None = None  # asked of all ranks by `poll`; gives 1 or 0
        self._complete: tuple[int, bool] | None = None  # step of the last save of this run, and whether it is reshardable
        self._newest: tuple[int, Path] | None = None  # this run's newest whole checkpoint under --save
        self._evaluated: RunState | None = None  # after the evaluation at the pending save's step
        if self._save is not None:
            async_writer.prepare_directory(self._save)

    # ---- saving -------------------------------------------------------------------------------------------------------

    def save(
        self, run: RunState, reference_losses: ReferenceLosses | None = None, name: str | None = None, final: bool = False
    ) -> None:
        """Save this step. A `name` keeps the checkpoint from being deleted; named and `final` ones load under any layout.

        Returns when the checkpoint is whole; under --async-save as soon as the tensors have been copied (call `poll` every step, and
        `finish` at the end). When saving fails, what was written is removed. Then --on-save-error decides whether the run stops with a
        SaveError or goes on. reference_losses: see train/evaluate.py; None for a model that is no teacher.
        """
        assert self._save is not None, "save without --save"
        self.finish()
        reshardable = final or name is not None or self._config.dist_ckpt_optim_fully_reshardable
        if name is None and (self._complete == (run.step, True) or self._complete == (run.step, reshardable)):
            return
        directory = save_directory.partial_of(self._save, run.step)
        sums: dict[str, integrity.FileSum] = {}
        started = time.monotonic()
        with sharded_state.settled(self._chunks), async_writer.sheltered():
            tensors, state = self._state_to_save(run, reference_losses, name, reshardable)
            problem = async_writer.on_rank_0(partial(self._write_companions, directory, state, sums))
            if problem is not None:
                self._failed(run.step, problem)
                return
            write = async_writer.plan(tensors, directory, self._mesh.groups)
            self._pending = _Pending(step=run.step, write=write, sums=sums, reshardable=reshardable, started=started)
            if self._config.async_save:
                async_writer.write_later(write, self._queue, self._publish)
            else:
                async_writer.write_now(write)
        if self._config.async_save:
            log.info("step %d: copied for saving in %.2f s", run.step, time.monotonic() - started)
        else:
            self._publish()

    def add_evaluation(self, run: RunState) -> None:
        """Note in this step's checkpoint what the evaluation after it decided, so that no resumed run repeats the evaluation.

        A save that is being written gets the note when it is complete. An error of the disk is logged and raises nothing."""
        if self._pending is not None and self._pending.step == run.step:
            self._evaluated = run
        elif self._newest is not None and self._newest[0] == run.step:
            problem = async_writer.on_rank_0(partial(self._write_evaluation, self._newest[1], run))
            if problem is not None:
                log.warning(
                    "step %d: its evaluation cannot be noted in --save (%s); a resumed run repeats it", run.step, problem
                )

    def _write_evaluation(self, directory: Path, run: RunState) -> None:
        """Rank 0. checksums.json does not list the file, which has a hash of its own."""
        self._check_owner()
        state_file.write_evaluation(directory, run)

    def poll(self) -> None:
        """Complete an --async-save that every rank has finished writing; returns at once otherwise. Call it every step.

        Ranks ask in one call and read the answer in the next, so that no call waits for the device.
        """
        if self._pending is None:
            return
        if self._still_writing is not None and self._still_writing() == 0:
            self.finish()
        else:
            self._still_writing = begin_largest(int(self._pending.write.is_under_way()))

    def finish(self) -> None:
        """Wait for an --async-save that is under way and complete it."""
        if self._pending is not None:
            self._still_writing = None
            self._queue.maybe_finalize_async_calls(blocking=True)

    def _state_to_save(
        self, run: RunState, reference_losses: ReferenceLosses | None, name: str | None, reshardable: bool
    ) -> tuple[sharded_state.State, CheckpointState]:
        """This rank's tensors, and the rest of the checkpoint. Collective over all ranks."""
        names, vector = rng.capture()
        model = sharded_state.model_state(self._chunks, self._mesh.groups)
        tensors: sharded_state.State = {**model, "rng": sharded_state.rng_state(vector, self._mesh.layout, self._mesh.rank)}
        optimizer = None
        if self._optimizer is not None:
            form = sharded_state.common_form(sharded_state.form_for(self._optimizer, reshardable))
            plans = sharded_state.all_bucket_plans(sharded_state.bucket_plan(self._chunks, model), self._mesh)
            optimizer = OptimizerState(form, sharded_state.optimizer_step(self._optimizer), plans)
            tensors["optimizer"] = sharded_state.optimizer_state(self._optimizer, model, form, is_loading=False)
        if scales := fp8_scales.state_to_save(self._chunks, self._mesh.groups):
            tensors["fp8"] = scales
        state = CheckpointState(
            name=name,
            saved_at=time.time(),
            lineage=self._lineage,
            megatron_core=megatron_core_version(),
            torch=torch.__version__,
            run=run,
            architecture=self._identity.architecture,
            tokenizer=self._identity.tokenizer_fingerprint,
            data_fingerprint=self._identity.data_fingerprint,
            reference_losses=reference_losses,
            layout=self._mesh.layout,
            chunks=len(self._chunks),
            rng=names,
            scheduler=None if self._scheduler is None else self._scheduler.state_dict(),
            optimizer=optimizer,
        )
        return tensors, state

    def _write_companions(self, directory: Path, state: CheckpointState, sums: dict[str, integrity.FileSum]) -> None:
        """Rank 0: write everything but the shards, and put their sums into `sums`."""
        self._check_owner()
        if os.path.lexists(directory):
            save_directory.delete(directory)
        (directory / TOKENIZER).mkdir(parents=True)
        self._tokenizer.save(directory / TOKENIZER)
        for path in sorted((directory / TOKENIZER).iterdir()):
            sums[f"{TOKENIZER}/{path.name}"] = integrity.sum_of_file(path)
        sums[RUN_YAML] = integrity.write_summed(directory / RUN_YAML, self._identity.yaml.encode())
        sums[save_directory.STATE] = state_file.write_state(directory, state)
        sums |= async_writer.write_core_files(directory)

    def _publish(self) -> None:
        """Complete the pending save after every rank has written."""
        pending, self._pending = self._pending, None
        evaluated, self._evaluated = self._evaluated, None
        assert pending is not None and self._save is not None
        shards, problem = async_writer.finish(pending.write)
        problem = problem or async_writer.on_rank_0(partial(self._seal, pending, shards))
        if problem is not None:
            self._failed(pending.step, problem)
            return
        self._complete = (pending.step, pending.reshardable)
        self._newest = (pending.step, save_directory.directory_of(self._save, pending.step))
        log.info(
            "step %d: saved %s, %.2f s after the call",
            pending.step,
            save_directory.directory_of(self._save, pending.step),
            time.monotonic() - pending.started,
        )
        if evaluated is not None:
            self.add_evaluation(evaluated)

    def _seal(self, pending: _Pending, shards: dict[str, integrity.FileSum]) -> None:
        """Rank 0: write the checksums, give the final name, move the tracker; then delete old checkpoints."""
        assert self._save is not None
        self._check_owner()
        directory = pending.write.directory
        metadata = {integrity.METADATA: integrity.sum_of_file(directory / integrity.METADATA)}
        integrity.write_checksums(directory, {**pending.sums, **shards, **metadata})
        save_directory.publish(self._save, pending.step)
        surplus: list[int] = []
        if self._config.keep_last is not None:
            surplus = retention.surplus(retention.saved_under(self._save), self._config.keep_last, pending.step, self._lineage)
        for line in save_directory.make_room(self._save, surplus):
            log.warning("--save: %s", line)

    def _failed(self, step: int, problem: str) -> None:
        message = from_rank_0(partial(self._give_up, step, problem))
        if self._config.on_save_error == "stop":
            raise SaveError(f"{message} (--on-save-error continue would go on without it)")
        log.error("%s", message)

    def _give_up(self, step: int, problem: str) -> str:
        """Rank 0: remove what was written of a save that failed; returns the message about it."""
        assert self._save is not None
        self._check_owner()
        directory = save_directory.partial_of(self._save, step)
        if directory.exists():
            with contextlib.suppress(OSError):
                save_directory.delete(directory)
        good = max(save_directory.whole_checkpoints(self._save), default=None)
        stands = "there is no earlier checkpoint" if good is None else f"{save_directory.directory_of(self._save, good)} stands"
        free = shutil.disk_usage(self._save).free / 2**30
        failed = f"saving step {step} to --save {self._save} ({free:.1f} GiB free) failed on {problem}"
        return f"{failed}; what there was of it is removed, {stands}"

    def is_taken(self) -> bool:
        """Whether this rank knows that another run has taken --save over. Rank 0 learns it within ten seconds, others never."""
        return self._owner is not None and self._owner.is_lost()

    def _check_owner(self) -> None:
        """Rank 0, before it writes or deletes: raise UserError where another run has taken --save over."""
        if self._owner is not None:
            self._owner.check()

    # ---- loading ------------------------------------------------------------------------------------------------------

    def load(self, opened: OpenedCheckpoint | None = None, look: Look = stay) -> RunState | None:
        """Put --load's checkpoint into model, optimizer, schedule and generators, as the flags say. Returns where training continues.

        None: there is nothing to load, so the run starts at step 0. opened: what `loading.open_checkpoint` returned earlier.
        look: called between the files that are verified. Raises UserError (also DamagedCheckpoint, UnsafePickle).
        """
        config = self._config
        if config.load is None:
            self._begin(None)
            return None
        opened = opened or loading.open_checkpoint(Path(config.load), config.load_fallback, look=look)
        if opened is None:
            compatibility.refuse_empty(config.load, config.save)
            log.info("no checkpoint in --load %s: starting afresh", config.load)
            self._begin(None)
            return None
        state = from_rank_0(partial(compatibility.take_over, opened, self._identity, config))
        self._begin(None if config.finetune else opened)
        vocabulary_size = self._identity.architecture.get("vocabulary")
        loading.load_tensors(opened, config, self._identity.seed, vocabulary_size, self._mesh, self._chunks, self._optimizer)
        if not config.finetune and self._scheduler is not None and opened.state.scheduler is not None:
            compatibility.load_schedule(self._scheduler, self._optimizer, opened, self._identity.schedule_follows_run)
        beside = self._save is not None and real_path(opened.directory.parent) == real_path(self._save)
        if beside and not opened.directory.is_symlink():  # a link may point to another run's checkpoint
            self._newest = (opened.state.run.step, opened.directory)
        return state

    def _begin(self, opened: OpenedCheckpoint | None) -> None:
        """Decide this run's lineage; opened: what it goes on from. Collective. Raises UserError where --save is another run's."""
        if self._save is not None:
            origin = None
            if opened is not None:
                origin = retention.Origin(opened.directory, opened.state.run.step, opened.state.lineage)
            self._lineage = from_rank_0(partial(retention.begin, self._config, origin))
