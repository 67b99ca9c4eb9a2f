"""From --load to tensors in memory: find a checkpoint, verify it, and put its tensors where they belong.

All ranks open a checkpoint together: each verifies a share of the files, and rank 0 checks the pickles before megatron-core reads them.
Whether the checkpoint belongs to this run is asked in compatibility.py. Collective over all ranks where not said otherwise.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.optimizer import MegatronOptimizer

from megatron_salt.checkpoint import fp8_scales, integrity, retention, rng, safe_unpickle, save_directory, sharded_state
from megatron_salt.checkpoint.async_writer import CORE_CONFIG, CORE_CONFIG_CONTENT
from megatron_salt.checkpoint.compatibility import not_reshardable, refuse_other_form
from megatron_salt.checkpoint.run_state import CheckpointState, OpenedCheckpoint, OptimizerForm
from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.config import CheckpointConfig
from megatron_salt.errors import Look, UserError, stay
from megatron_salt.parallel.collectives import first_problem, from_rank_0, gathered
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.small_files import read_json

log = logging.getLogger(__name__)

_REQUIRED = (integrity.METADATA, safe_unpickle.COMMON, CORE_CONFIG, save_directory.STATE)


# ---- finding and verifying ---------------------------------------------------------------------------------------------


def checkpoint_fingerprint(directory: Path) -> str:
    """Names the contents of a whole checkpoint, wherever it lies. Not collective; reads the list of checksums alone."""
    sums = integrity.read_checksums(directory, _REQUIRED)
    return "sha256:" + hashlib.sha256(json.dumps({name: sums[name].sha256 for name in sorted(sums)}).encode()).hexdigest()[:32]


def open_checkpoint(load: Path, fallback: bool, flag_name: str = "--load", look: Look = stay) -> OpenedCheckpoint | None:
    """Find and verify the checkpoint that `load` means; None where there is none. `flag_name`: the flag that gave `load`.

    look: called after every file that this rank has hashed. Raises UserError; DamagedCheckpoint where files are not what was written,
    unless `fallback` and an earlier checkpoint is whole.
    """
    paths = from_rank_0(lambda: retention.of_one_run(save_directory.candidates(load, fallback, flag_name)))
    return _first_whole(paths, fallback, flag_name, lambda directory: _verified(directory, look))


def glance_at_checkpoint(load: Path, fallback: bool) -> OpenedCheckpoint | None:
    """The same for --load, but only state.json is read and nothing is verified. Not collective."""
    paths = retention.of_one_run(save_directory.candidates(load, fallback))
    return _first_whole(paths, fallback, "--load", lambda directory: OpenedCheckpoint(directory, read_state(directory), {}))


def _first_whole(
    paths: Sequence[Path], fallback: bool, flag_name: str, open_: Callable[[Path], OpenedCheckpoint]
) -> OpenedCheckpoint | None:
    for number, directory in enumerate(paths, start=1):
        try:
            return open_(directory)
        except integrity.DamagedCheckpoint as error:
            if fallback and number < len(paths):
                log.error("%s: %s\n--load-fallback: trying %s", flag_name, error, paths[number])
                continue
            could = number < len(paths) and flag_name == "--load"
            hint = f"; --load-fallback would resume from {paths[number]} instead" if could else ""
            raise integrity.DamagedCheckpoint(f"{flag_name}: {error}{hint}") from None
    return None


def _verified(directory: Path, look: Look) -> OpenedCheckpoint:
    sums = from_rank_0(lambda: integrity.read_checksums(directory, _REQUIRED))
    damage = _damaged_files(directory, sums, look)
    if damage:
        raise integrity.DamagedCheckpoint(f"{directory} is damaged: " + "; ".join(damage))

    def read() -> OpenedCheckpoint:
        state = read_state(directory)
        _check_core_config(directory)
        try:
            metadata = safe_unpickle.check_pickles(directory, sums)
        except safe_unpickle.Unreadable as error:
            raise UserError(f"{error}; it was written with torch {state.torch}") from None
        return OpenedCheckpoint(directory, state, tensor_sizes(metadata))

    return from_rank_0(read)


def _damaged_files(directory: Path, sums: dict[str, integrity.FileSum], look: Look) -> list[str]:
    """A line for each file that is not as `sums` says; rank r hashes every file n with n mod ranks == r."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names, own = sorted(sums), []
    for first in range(0, len(names), world_size):
        own += integrity.damaged_files(directory, {name: sums[name] for name in names[first + rank : first + rank + 1]})
        look(f"verifying {directory}")  # every rank has the same number of rounds, also where the last has no file for it
    return [line for part in gathered(own) for line in part]


def _check_core_config(directory: Path) -> None:
    path = directory / CORE_CONFIG
    try:
        if read_json(path) != CORE_CONFIG_CONTENT:
            raise ValueError(f"it does not hold {json.dumps(CORE_CONFIG_CONTENT)}")
    except (OSError, ValueError) as error:
        raise integrity.DamagedCheckpoint(f"{path}: cannot be read: {error}") from None


def tensor_sizes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Global size of every tensor in torch_dist's table of contents. Pure."""
    tables = metadata.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in tables if isinstance(entry, TensorStorageMetadata)}


# ---- reading tensors ---------------------------------------------------------------------------------------------------


def load_weights(load: Path, chunks: Sequence[nn.Module], mesh: Mesh) -> CheckpointState:
    """Put only the weights of a checkpoint into model chunks of any layout; returns its state.

    `load` is a directory of checkpoints, or one iter_* directory. Raises UserError where there is none, it is damaged, or
    shapes differ.
    """
    opened = open_checkpoint(load, fallback=False)
    if opened is None:
        raise UserError(f"{load} holds no checkpoint")
    state = sharded_state.model_state(chunks, mesh.groups)
    refuse_mismatches(opened.directory, sharded_state.mismatches(state, opened.sizes))
    sharded_state.load_model(chunks, sharded_state.load(state, opened.directory, mesh.groups))
    return opened.state


def load_tensors(
    opened: OpenedCheckpoint,
    config: CheckpointConfig,
    seed: int,
    vocabulary_size: int | None,
    mesh: Mesh,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None,
) -> None:
    """Put a checkpoint's tensors into model, optimizer and generators, as --finetune, --no-load-optim and --no-load-rng say.

    seed: --seed, for generators whose state cannot be used. vocabulary_size: ids of this run; --finetune takes the rows of these from a
    checkpoint of more rows, or of another padding. None: the rows must be as many. Raises UserError where this run cannot take the tensors.
    """
    saved = opened.state
    model = sharded_state.model_state(chunks, mesh.groups)
    state: sharded_state.State = dict(model)
    to_load = None if config.finetune or config.no_load_optim else optimizer
    if to_load is not None:
        form = loadable_form(opened, to_load, sharded_state.bucket_plan(chunks, model), mesh, len(chunks))
        state["optimizer"] = sharded_state.optimizer_state(to_load, model, form, is_loading=True)
    with_rng = not (config.finetune or config.no_load_rng)
    names, vector = rng.capture()
    same_generators = saved.layout.sizes == mesh.layout.sizes and saved.rng == names
    if with_rng and same_generators:
        state["rng"] = sharded_state.rng_state(torch.empty_like(vector), mesh.layout, mesh.rank)
    if scales := fp8_scales.state_to_load(chunks, mesh.groups, opened.sizes):
        state["fp8"] = scales
    wrong = sharded_state.mismatches(state, opened.sizes)
    if config.finetune and vocabulary_size is not None:
        wrong = [one for one in wrong if not sharded_state.differs_in_vocabulary(one, vocabulary_size)]
    refuse_mismatches(opened.directory, wrong)
    loaded = sharded_state.load(state, opened.directory, mesh.groups)
    sharded_state.load_model(chunks, loaded)
    fp8_scales.load_state(chunks, loaded.get("fp8", {}))
    if to_load is not None:
        assert saved.optimizer is not None
        sharded_state.load_optimizer(to_load, loaded["optimizer"], saved.optimizer.step)
    elif optimizer is not None:
        optimizer.reload_model_params()
    if with_rng and same_generators:
        rng.restore(names, loaded["rng"].flatten())
    elif with_rng:
        seed_everything(seed + saved.run.step, mesh)
        log.warning(
            "%s has random state for %s, this run is %s: generators are seeded anew from --seed and the step",
            opened.directory,
            saved.layout.sizes,
            mesh.layout.sizes,
        )


def refuse_mismatches(directory: Path, mismatches: Sequence[sharded_state.Mismatch]) -> None:
    """Raise UserError where any rank found tensors that do not fit."""
    shown = "; ".join(map(str, mismatches[:4])) + (f"; and {len(mismatches) - 4} more" if len(mismatches) > 4 else "")
    problem = first_problem(shown or None)
    if problem is not None:
        raise UserError(f"{directory} does not fit this model: {problem}")


def loadable_form(
    opened: OpenedCheckpoint, optimizer: MegatronOptimizer, plan: str, mesh: Mesh, num_chunks: int
) -> OptimizerForm:
    """The form of the checkpoint's optimizer state. plan: this rank's `sharded_state.bucket_plan`.

    Raises UserError where this run cannot load that form.
    """
    own_form = sharded_state.form_for(optimizer, reshardable=False)
    form = refuse_other_form(opened, own_form != "plain", mesh.layout, num_chunks)
    if form != "dp_reshardable":
        return form
    assert opened.state.optimizer is not None
    saved_plan, problem = opened.state.optimizer.bucket_plans.get(sharded_state.model_parallel_place(mesh)), None
    if first_problem(None if saved_plan == plan else "another plan") is not None:
        problem = (
            "was written with another split into stages or gradient buckets (--decoder-first-pipeline-num-layers and "
            "its like, --ddp-bucket-size, --overlap-grad-reduce)"
        )
    elif first_problem(None if own_form == form else "an empty bucket") is not None:
        problem = f"cannot be cut for {mesh.groups.dp_cp.size()} data- and context-parallel ranks: some would get nothing"
    if problem is not None:
        raise not_reshardable(opened, problem)
    return form
