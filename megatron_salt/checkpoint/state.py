"""What `state.json` of a checkpoint may hold: the type of each fact that a reader uses, in one place.

A stranger or a failing disk may have written it. A count is a whole number from 0 on, a measurement that is compared is
finite, and what is listed beside something else is as long. Facts that this release does not know are let through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from megatron_salt.config import ModelConfig

Count = Annotated[int, Meta(ge=0, le=2**62)]
Size = Annotated[int, Meta(ge=1, le=2**31)]
_Kind = TypeVar("_Kind")
Scalar = bool | int | float | str | None


class _Salt(Struct, forbid_unknown_fields=True):
    """progress.SaltProgress"""

    stage1_end: Count
    schedule: dict[str, Scalar]
    teacher: str | None
    teacher_directory: str | None
    crossover: Count | None = None
    teacher_held_out: dict[str, float] | None = None


class _Probe(Struct):
    """train/evaluate.py"""

    lengths: list[Size]
    losses: list[float | None]
    dtype: str


class _Layout(Struct):
    tensor: Size
    context: Size
    data: Size
    pipeline: Size


class _Optimizer(Struct):
    form: Literal["dp_reshardable", "fully_reshardable", "plain"]
    step: Count
    bucket_plans: dict[str, str]


class _Schedule(Struct):
    """Of the learning rate; the other names are megatron-core's (see `resume.load_schedule`)."""

    num_steps: Count


class _Data(Struct):
    position: Count | UnsetType = UNSET
    stage2_since: Count | UnsetType = UNSET


class _Extra(Struct):
    nonfinite_in_a_row: Count | UnsetType = UNSET
    evaluation_due: bool | UnsetType = UNSET


class _Architecture(Struct):
    """Beside the fields of ModelConfig, which `model_of` reads."""

    vocabulary: Size | UnsetType = UNSET
    seq_length: Size | UnsetType = UNSET


class _State(Struct):
    saved_at: Annotated[float, Meta(ge=0)]
    name: str | None
    megatron_core: str
    torch: str
    step: Count
    consumed_samples: Count
    data: _Data
    events: list[dict[str, Any]]
    extra: _Extra
    architecture: _Architecture
    tokenizer: str
    data_fingerprint: str
    layout: _Layout
    chunks: Size
    rng: list[tuple[str, Count]]
    scheduler: _Schedule | None
    optimizer: _Optimizer | None
    probe: _Probe | None = None
    salt: _Salt | None = None


def check_state(facts: Any) -> None:
    """Raise ValueError, in one line, where a fact is missing or is not what this release takes it for. Pure."""
    state = _converted(facts, _State)
    if state.probe is not None and (len(state.probe.lengths) != len(state.probe.losses) or not state.probe.lengths):
        raise ValueError(f"its probe has {len(state.probe.lengths)} lengths and {len(state.probe.losses)} losses")
    compared: dict[str, Any] = {
        "saved_at": state.saved_at,
        "probe": [] if state.probe is None else state.probe.losses,
        "architecture": facts["architecture"],
        "scheduler": facts["scheduler"],
        "salt": {} if state.salt is None else state.salt.schedule,
    }
    for name, value in compared.items():
        if not _is_finite(value):
            raise ValueError(f"a number in its {name} is not finite")
    model_of(facts["architecture"])


def model_of(architecture: Mapping[str, Any]) -> ModelConfig:
    """The model that a checkpoint is of, from `architecture` of its facts; fields that it lacks have their defaults. Raises ValueError."""
    known = {field.name: architecture[field.name] for field in fields(ModelConfig) if field.name in architecture}
    return _converted(known, ModelConfig)


def _converted(facts: Any, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.convert(facts, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace("`$.", "`")) from None


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
