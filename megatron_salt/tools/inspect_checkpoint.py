"""Print what is inside a checkpoint: python tools/inspect_checkpoint.py --load DIRECTORY [--verify].

Reads `state.json` and torch_dist's table of contents. The table is unpickled without running code, so a checkpoint from a stranger is
safe to inspect. Needs no ranks and no GPU. Reads no weights, unless --verify asks for the checksum of every file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_salt.checkpoint import integrity, save_directory
from megatron_salt.checkpoint.run_state import CheckpointState, ReferenceLosses, RunState
from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.cli import run_tool
from megatron_salt.config import flag
from megatron_salt.errors import UserError
from megatron_salt.small_files import one_line, read_small

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_NOT_THE_MODEL = ("optimizer.", "chained_", "rng", "fp8.")


@dataclass(frozen=True)
class InspectConfig:
    """Print what is inside a checkpoint."""

    load: str
    """Directory of checkpoints, of which the latest is shown, or one iter_* directory."""

    tensors: bool = False
    """List every tensor: shape, dtype, size."""

    print_config: bool = False
    """Print the configuration of the run that wrote the checkpoint."""

    verify: bool = False
    """Read every file and compare its checksum. If files differ, name them and exit with status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(InspectConfig, inspect_checkpoint, argv)


def inspect_checkpoint(config: InspectConfig) -> int:
    """Print the report. Returns 0. Raises DamagedCheckpoint, which with --verify names every damaged file."""
    candidates = save_directory.candidates(Path(config.load))
    if not candidates:
        raise UserError(f"--load {config.load} holds no checkpoint{save_directory.how_to_import(Path(config.load))}")
    directory = candidates[0]
    sums = integrity.read_checksums(directory, required=(integrity.METADATA, save_directory.STATE))
    damage = integrity.damaged_files(directory, sums) if config.verify else []
    if damage:
        raise integrity.DamagedCheckpoint("; ".join(damage))
    print("\n".join(_report(directory, sums, config)))
    if config.verify:
        print(f"checksums    all {len(sums)} files are as written")
    return 0


def _report(directory: Path, sums: dict[str, integrity.FileSum], config: InspectConfig) -> list[str]:
    """Lines of the report. Raises UserError that names the file, before anything is printed."""
    from megatron_salt.checkpoint import safe_unpickle

    state, metadata = read_state(directory), safe_unpickle.read_metadata(directory)
    lines = _about(directory, state, sums)
    try:
        lines += _sizes(metadata)
        lines += _table(metadata) if config.tensors else []
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise integrity.DamagedCheckpoint(f"{directory / integrity.METADATA}: cannot be read: {error!r}") from None
    if config.print_config:
        lines += _run_yaml(directory / save_directory.RUN_YAML)
    return lines


def _run_yaml(path: Path) -> list[str]:
    try:
        return read_small(path).decode("utf-8").splitlines()
    except OSError as error:
        raise integrity.DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise integrity.DamagedCheckpoint(f"{path}: cannot be read: {error}") from None


def _about(directory: Path, state: CheckpointState, sums: dict[str, integrity.FileSum]) -> list[str]:
    run, optimizer = state.run, state.optimizer
    name = "" if state.name is None else f" ({state.name})"
    since = {} if run.stage2_since is None else {"stage2_since": run.stage2_since}
    lines = [
        f"checkpoint   {directory}{name}",
        f"step         {run.step}, {run.consumed_samples} samples",
        f"files        {len(sums)}, {_bytes(sum(entry.size for entry in sums.values()))}",
        f"layout       {', '.join(f'{axis} {size}' for axis, size in state.layout.sizes.items())}, {state.chunks} chunks a rank",
        "optimizer    " + ("none" if optimizer is None else f"{optimizer.form}, {optimizer.step} updates"),
        f"tokenizer    {state.tokenizer}",
        f"data         {state.data_fingerprint}, position {json.dumps({'position': run.position} | since)}",
        f"written by   megatron-core {state.megatron_core}, torch {state.torch}",
        "model        " + ", ".join(f"{field} {value}" for field, value in state.architecture.items() if value is not None),
        "own loss     " + _own_loss(state.reference_losses),
        *_stages(run),
    ]
    lines += [f"event        {json.dumps(event)}" for event in run.events]
    return lines


def _own_loss(recorded: ReferenceLosses | None) -> str:
    """The model's losses on the reference batch (data/reference_batch.py), by which a run recognises it as its teacher."""
    if recorded is None:
        return "not recorded: it cannot be a teacher"
    losses = [
        f"{'not finite' if loss is None else format(loss, '.5f')} over {length}"
        for length, loss in zip(recorded.lengths, recorded.losses, strict=True)
    ]
    return f"{', '.join(losses)} tokens, {recorded.dtype}, computed by {one_line(recorded.origin)}"


def _stages(run: RunState) -> list[str]:
    salt = run.salt
    if salt is None:
        return ["stage        no teacher"]
    stage = salt.stage_after(run.step)
    ends = f"stage 1 {'ends' if stage == 1 else 'ended'} after step {salt.stage1_end}"
    crossover = "" if salt.crossover is None else f", because the student had passed its teacher at step {salt.crossover}"
    held_out = salt.teacher_held_out or {}
    teacher = "none: stage 1 has a selection" if salt.teacher is None else f"{salt.teacher}, then in {salt.teacher_directory}"
    return [
        f"stage        {stage}; {ends}{crossover}",
        "schedule     " + ", ".join(f"{flag(name)} {value}" for name, value in salt.schedule.items()),
        f"teacher      {teacher}",
        *(
            ["held out     the teacher's " + ", ".join(f"{name} {value:g}" for name, value in held_out.items())]
            if held_out
            else []
        ),
    ]


def _sizes(metadata: Metadata) -> list[str]:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

    tensors = {key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
    model = {key: entry for key, entry in tensors.items() if not key.startswith(_NOT_THE_MODEL)}
    dtypes = sorted({str(entry.properties.dtype).removeprefix("torch.") for entry in model.values()})
    count = sum(math.prod(entry.size) for entry in model.values())
    objects = sum(isinstance(entry, BytesStorageMetadata) for entry in metadata.state_dict_metadata.values())
    return [
        f"parameters   {count:,} in {len(model)} tensors, {', '.join(dtypes)}",
        f"tensors      {len(tensors)}, {_bytes(sum(_size(entry) for entry in tensors.values()))}; {objects} other objects",
    ]


def _table(metadata: Metadata) -> list[str]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    lines = []
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            lines.append(
                f"  {key:<64} {list(entry.size)!s:<24} {dtype:<10} {_bytes(_size(entry)):>10}  {len(entry.chunks)} shards"
            )
        else:
            lines.append(f"  {key:<64} object")
    return lines


def _size(entry: TensorStorageMetadata) -> int:
    return math.prod(entry.size) * entry.properties.dtype.itemsize


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
