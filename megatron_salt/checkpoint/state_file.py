"""`state.json` and `evaluated.json` of a checkpoint: the one module that reads and writes `CheckpointState`.

A stranger or a failing disk may have written the files, so every value is checked: a count is a whole number from 0 on, a
measurement that is compared is finite, and lists that belong together are equally long. Names that this release does not know are
ignored. A checkpoint is saved before the evaluation at its step, and its state.json says that this one is due. `evaluated.json` is added
afterwards and says what was decided; without it, a resumed run begins with the evaluation and decides the same. Not collective.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from megatron_salt.checkpoint.integrity import DamagedCheckpoint, FileSum, write_summed
from megatron_salt.checkpoint.run_state import (
    CheckpointState,
    OptimizerForm,
    OptimizerState,
    PartDue,
    ReferenceLosses,
    RunState,
    SaltState,
    lineage_in,
)
from megatron_salt.checkpoint.save_directory import STATE
from megatron_salt.config import ModelConfig
from megatron_salt.errors import UserError
from megatron_salt.files import write_whole
from megatron_salt.parallel.layout import Layout
from megatron_salt.small_files import one_line, read_json

FORMAT = 1
EVALUATED = "evaluated.json"

Count = Annotated[int, Meta(ge=0, le=2**62)]
Size = Annotated[int, Meta(ge=1, le=2**31)]
Scalar = bool | int | float | str | None
_Kind = TypeVar("_Kind")


# ---- the file as it is on disk -----------------------------------------------------------------------------------------


class _Salt(Struct, forbid_unknown_fields=True):
    stage1_end: Count
    schedule: dict[str, Scalar]
    teacher: str | None
    teacher_directory: str | None
    crossover: Count | None = None
    teacher_held_out: dict[str, float] | None = None


class _Probe(Struct):
    """ReferenceLosses"""

    lengths: list[Size]
    losses: list[float | None]
    dtype: str
    computed_by: str | None = None


class _Layout(Struct):
    tensor: Size
    context: Size
    data: Size
    pipeline: Size


class _Optimizer(Struct):
    form: OptimizerForm
    step: Count
    bucket_plans: dict[str, str]


class _Scheduler(Struct):
    """The other names are megatron-core's: see `compatibility.schedule_to_load`."""

    num_steps: Count


class _Data(Struct):
    position: Count | UnsetType = UNSET
    stage2_since: Count | UnsetType = UNSET


class _Extra(Struct):
    nonfinite_in_a_row: Count | UnsetType = UNSET
    evaluation_due: bool | UnsetType = UNSET
    due: list[PartDue] | UnsetType = UNSET
    """Not written where only held-out sets are due."""
    teacher_flops: Annotated[float, Meta(ge=0)] | UnsetType = UNSET


class _Architecture(Struct):
    """Beside the fields of ModelConfig, which `model_of` reads."""

    vocabulary: Size | UnsetType = UNSET
    seq_length: Size | UnsetType = UNSET


class _State(Struct):
    """The fields of state.json. Those with a default were not yet written by the first release."""

    saved_at: Annotated[float, Meta(ge=0)]
    name: str | None
    megatron_core: str
    torch: str
    step: Count
    consumed_samples: Count
    data: _Data
    events: list[dict[str, Any]]
    architecture: _Architecture
    tokenizer: str
    data_fingerprint: str
    layout: _Layout
    chunks: Size
    rng: list[tuple[str, Count]]
    scheduler: _Scheduler | None
    optimizer: _Optimizer | None
    extra: _Extra
    probe: _Probe | None = None
    salt: _Salt | None = None


def state_content(state: CheckpointState) -> bytes:
    """The bytes of state.json. Pure."""
    run = state.run
    data = {"position": run.position} | ({} if run.stage2_since is None else {"stage2_since": run.stage2_since})
    extra: dict[str, Any] = {"nonfinite_in_a_row": run.nonfinite_in_a_row, "evaluation_due": run.evaluation_due}
    content = {
        "format": FORMAT,
        "name": state.name,
        "saved_at": state.saved_at,
        "lineage": state.lineage,
        "megatron_core": state.megatron_core,
        "torch": state.torch,
        "step": run.step,
        "consumed_samples": run.consumed_samples,
        "data": data,
        "events": run.events,
        "extra": extra
        | ({"due": run.due} if "tasks" in run.due else {})
        | ({"teacher_flops": run.teacher_flops} if run.teacher_flops else {}),
        "salt": None if run.salt is None else asdict(run.salt),
        "architecture": state.architecture,
        "tokenizer": state.tokenizer,
        "data_fingerprint": state.data_fingerprint,
        "probe": None if state.reference_losses is None else _probe_content(state.reference_losses),
        "layout": state.layout.sizes,
        "chunks": state.chunks,
        "rng": state.rng,
        "scheduler": state.scheduler,
        "optimizer": None if state.optimizer is None else asdict(state.optimizer),
    }
    return json.dumps(content, indent=1).encode()


def parse_state(content: Any) -> CheckpointState:
    """The state that JSON holds; what an earlier release did not write has its default. Pure.

    Raises ValueError, in one line, where a value is missing or is not what this release takes it for.
    """
    state = _converted(content, _State)
    _check_numbers(state, content)
    probe, optimizer = state.probe, state.optimizer
    return CheckpointState(
        name=state.name,
        saved_at=state.saved_at,
        lineage=lineage_in(content),
        megatron_core=state.megatron_core,
        torch=state.torch,
        run=RunState(
            step=state.step,
            consumed_samples=state.consumed_samples,
            position=state.data.position or 0,
            stage2_since=None if state.data.stage2_since is UNSET else state.data.stage2_since,
            teacher_flops=_teacher_flops(state),
            nonfinite_in_a_row=state.extra.nonfinite_in_a_row or 0,
            evaluation_due=state.extra.evaluation_due is True,
            due=tuple(state.extra.due or (["held_out"] if state.extra.evaluation_due is True else [])),
            events=tuple(state.events),
            salt=_salt_state(state.salt),
        ),
        architecture=content["architecture"],
        tokenizer=state.tokenizer,
        data_fingerprint=state.data_fingerprint,
        reference_losses=None if probe is None else _reference_losses(probe),
        layout=Layout(**msgspec.structs.asdict(state.layout)),
        chunks=state.chunks,
        rng=state.rng,
        scheduler=content["scheduler"],
        optimizer=None if optimizer is None else OptimizerState(optimizer.form, optimizer.step, optimizer.bucket_plans),
    )


def model_of(architecture: Mapping[str, Any]) -> ModelConfig:
    """The model of a checkpoint with this `CheckpointState.architecture`; absent fields have their defaults. Raises ValueError."""
    known = {field.name: architecture[field.name] for field in fields(ModelConfig) if field.name in architecture}
    return _converted(known, ModelConfig)


def _probe_content(recorded: ReferenceLosses) -> dict[str, Any]:
    """A run writes the names that the first release wrote."""
    return {name: value for name, value in asdict(recorded).items() if (name, value) != ("computed_by", None)}


def _reference_losses(probe: _Probe) -> ReferenceLosses:
    return ReferenceLosses(tuple(probe.lengths), tuple(probe.losses), probe.dtype, probe.computed_by)


def _salt_state(salt: _Salt | None) -> SaltState | None:
    return None if salt is None else SaltState(**msgspec.structs.asdict(salt))


def _teacher_flops(state: _State) -> float | None:
    if state.extra.teacher_flops is not UNSET:
        return state.extra.teacher_flops
    return 0.0 if state.salt is None or state.salt.teacher is None or state.step == 0 else None


def _check_numbers(state: _State, content: Mapping[str, Any]) -> None:
    """Raise ValueError where lists differ in length, a number that is compared is not finite, or the model is impossible."""
    if state.probe is not None and (len(state.probe.lengths) != len(state.probe.losses) or not state.probe.lengths):
        raise ValueError(f"its probe has {len(state.probe.lengths)} lengths and {len(state.probe.losses)} losses")
    compared: dict[str, Any] = {
        "saved_at": state.saved_at,
        "probe": [] if state.probe is None else state.probe.losses,
        "architecture": content["architecture"],
        "scheduler": content["scheduler"],
        "extra": 0.0 if state.extra.teacher_flops is UNSET else state.extra.teacher_flops,
        "salt": {} if state.salt is None else state.salt.schedule,
    }
    for name, value in compared.items():
        if not _is_finite(value):
            raise ValueError(f"a number in its {name} is not finite")
    model_of(content["architecture"])


def _converted(value: Any, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(one_line(str(error).replace("`$.", "`"))) from None


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


# ---- in a checkpoint's directory ---------------------------------------------------------------------------------------


def write_state(directory: Path, state: CheckpointState) -> FileSum:
    """Write state.json, durably; its size and hash. Raises OSError."""
    return write_summed(directory / STATE, state_content(state))


def read_state(directory: Path) -> CheckpointState:
    """The state of a checkpoint, after the evaluation at its step where that is done.

    Raises UserError for another format, DamagedCheckpoint where a file is missing or is not what was written.
    """
    path = directory / STATE
    try:
        content = read_json(path, nan=True)
        written = content["format"]
        state = parse_state(content) if type(written) is int and written == FORMAT else None
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}, so this is no whole checkpoint of megatron_salt") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error}") from None
    if state is None:
        raise UserError(f"{path} has format {one_line(written, 24)}; this release reads format {FORMAT}")
    return replace(state, run=_after_evaluation(directory, state.run))


def write_evaluation(directory: Path, run: RunState) -> None:
    """Add evaluated.json to the checkpoint of this step. `run`: the state after the evaluation. Raises OSError."""
    decided = {"step": run.step, "salt": None if run.salt is None else asdict(run.salt)}
    content = json.dumps({"decided": decided, "sha256": _hash_of(decided)}).encode()
    write_whole(directory / EVALUATED, content, durable=True)


def _after_evaluation(directory: Path, saved: RunState) -> RunState:
    """The state after the evaluation; `saved` itself where evaluated.json is absent. Raises DamagedCheckpoint."""
    path = directory / EVALUATED
    try:
        written = read_json(path, nan=True)
        decided = written["decided"]
        if written["sha256"] != _hash_of(decided) or decided["step"] != saved.step:
            raise ValueError("its contents are not what was written")
        salt = _salt_state(_converted(decided["salt"], _Salt | None))  # type: ignore[arg-type]
    except FileNotFoundError:
        return saved
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({error}); without the file a resumed run repeats the evaluation"
        ) from None
    return replace(saved, salt=salt, evaluation_due=False, due=())


def _hash_of(decided: Any) -> str:
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
