"""STUDY.yaml as a Study. docs/study.md describes the file.

YAML as in a run's --config. Unknown keys, kinds and flags are refused with a suggestion; every message names the file and the key.
Paths are relative to the directory in which the study is started, as those of a run are.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_salt import yaml_core
from megatron_salt.config import SaltConfig, flag
from megatron_salt.config.yaml_text import read_sections, typed_leaf, typed_value
from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.small_files import read_small
from megatron_salt.study.definition.arms import overlaid
from megatron_salt.study.definition.study import (
    KINDS,
    NEED_TEACHER,
    WITH_SELECTION,
    Arm,
    Figures,
    GrowSource,
    PrimaryQuestion,
    Sections,
    SelectionRule,
    Study,
    Teacher,
    refuse_unsafe,
)
from megatron_salt.study.job import SlurmOptions

T = TypeVar("T")

SET_BY_THE_STUDY = (
    "save", "load", "finetune", "new_data", "no_load_optim", "no_load_rng", "overwrite_save", "take_over_save", "save_at", "seed",
    "outcome_file", "exit_signal_handler", "jsonl", "tensorboard_dir", "teacher_load", "stage1_selection",
)  # fmt: skip
"""Fields of RunConfig that the study sets in each run; STUDY.yaml and the configs that it names may not."""


@dataclass(frozen=True, kw_only=True)
class _TeacherEntry:
    load: str | None = None
    config: str | None = None
    flags: dict[str, Any] | None = None
    ranks: int | None = None
    training_flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class _ArmEntry:
    kind: str | None = None
    flags: dict[str, Any] | None = None
    teacher: str | None = None
    selection: dict[str, Any] | None = None
    grow: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _GrowEntry:
    num_layers: int
    train_iters: int
    flags: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """The top level of the file."""

    output: str
    config: str
    arms: dict[str, Any]
    seeds: tuple[int, ...]
    flags: dict[str, Any] | None = None
    ranks: int = 1
    teacher: dict[str, Any] | None = None
    teachers: dict[str, Any] | None = None
    teacher_shared_by: int = 10
    salt: dict[str, Any] | None = None
    selection: dict[str, Any] | None = None
    axes: dict[str, Any] | None = None
    primary: dict[str, Any] | None = None
    figures: dict[str, Any] | None = None
    slurm: dict[str, Any] | None = None


def read_study(path: Path) -> Study:
    """The study in a file, with the configs that it names. Raises UserError."""
    try:
        text = read_small(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return parse_study(text, str(path))


def parse_study(text: str, source: str) -> Study:
    """The study in a YAML text. `source` names it in a UserError."""
    try:
        tree = yaml_core.load(text)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    entries = _read(_Entries, tree, source)
    base = _run_sections(entries.config, entries.flags, source)
    salt = _flags(entries.salt, f"{source}: salt", SaltConfig)
    teachers = _teachers(entries, source)
    arms = tuple(_arm(name, tree, entries, teachers, source) for name, tree in _named(entries.arms, f"{source}: arms"))
    figures = _read(Figures, entries.figures or {}, f"{source}: figures")
    primary = None if entries.primary is None else _read(PrimaryQuestion, entries.primary, f"{source}: primary")
    axes = _axes(entries.axes, source)
    slurm = None if entries.slurm is None else _read(SlurmOptions, entries.slurm, f"{source}: slurm")
    try:
        return Study(
            output=Path(entries.output),
            sections=base,
            salt=salt,
            ranks=entries.ranks,
            seeds=entries.seeds,
            teachers=teachers,
            teacher_shared_by=entries.teacher_shared_by,
            arms=arms,
            axes=axes,
            primary=primary,
            figures=figures,
            slurm=slurm,
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _teachers(entries: _Entries, source: str) -> dict[str, Teacher]:
    """{name: teacher}; a single `teacher:` has this name."""
    if entries.teacher is not None and entries.teachers is not None:
        raise UserError(f"{source}: teacher: is one teacher and teachers: are several; give one of them")
    trees = {"teacher": entries.teacher} if entries.teacher is not None else entries.teachers or {}
    found = {}
    for name, tree in trees.items():
        where = f"{source}: teacher" if entries.teachers is None else f"{source}: teachers.{name}"
        refuse_unsafe(str(name), f"{source}: teachers:")
        entry = _read(_TeacherEntry, tree, where)
        if entry.load is not None and (entry.flags or entry.ranks is not None):
            raise UserError(f"{where}: flags and ranks are for a teacher that the study trains, and load names one that exists")
        sections = None if entry.config is None else _run_sections(entry.config, entry.flags, where)
        try:
            found[str(name)] = Teacher(
                name=str(name),
                load=entry.load,
                sections=sections,
                ranks=entries.ranks if entry.ranks is None else entry.ranks,
                training_flops=entry.training_flops,
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return found


def _arm(name: str, tree: Any, entries: _Entries, teachers: Mapping[str, Teacher], source: str) -> Arm:
    where = f"{source}: arms.{name}"
    entry = _read(_ArmEntry, {} if tree is None else tree, where)
    kind = next((kind for kind in KINDS if kind == (entry.kind or name)), None)
    if kind is None:
        told = f"{where}: there is no kind {entry.kind}" if entry.kind else f"{where}: needs kind:, since {name} is none"
        raise UserError(f"{told}{did_you_mean(entry.kind or name, KINDS)}; kinds are {', '.join(KINDS)}")
    selection = entry.selection
    if kind in WITH_SELECTION and (entries.selection or selection):
        selection = {**(entries.selection or {}), **(selection or {})}
    teacher = entry.teacher
    if teacher is None and kind in NEED_TEACHER and len(teachers) == 1:
        teacher = next(iter(teachers))
    return Arm(
        name=name,
        kind=kind,
        flags=_flags(entry.flags, f"{where}.flags"),
        teacher=teacher,
        selection=None if selection is None else _read(SelectionRule, selection, f"{where}: selection"),
        grow=None if entry.grow is None else _grow(entry.grow, f"{where}.grow"),
    )


def _grow(tree: Mapping[str, Any], where: str) -> GrowSource:
    entry = _read(_GrowEntry, tree, where)
    try:
        return GrowSource(
            num_layers=entry.num_layers, train_iters=entry.train_iters, flags=_flags(entry.flags, f"{where}.flags")
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _axes(trees: Mapping[str, Any] | None, source: str) -> dict[str, tuple[Any, ...]]:
    """{field: values}, each value of the field's type."""
    axes: dict[str, tuple[Any, ...]] = {}
    for name, values in (trees or {}).items():
        where = f"{source}: axes"
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}.{name}: expected a list of values such as [a, b], got {values!r}")
        axes[name] = tuple(_flags({name: value}, where)[name] for value in values)
        if len(set(axes[name])) < len(values):
            raise UserError(f"{where}.{name}: a value is given twice: {', '.join(map(str, axes[name]))}")
    return axes


def _run_sections(path: str, flags: Mapping[str, Any] | None, where: str) -> Sections:
    """What the YAML of a run sets, and `flags` over it. Raises UserError where it sets what the study sets.

    Its --save and --seed are passed over: every run's YAML may have them.
    """
    try:
        text = read_small(Path(path)).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: config {path} cannot be read: {error}; a path is relative to {Path.cwd()}") from error
    sections = read_sections(text, path)
    for members in sections.values():
        for name, value in members.items():
            if name in SET_BY_THE_STUDY and name not in ("save", "seed") and value not in (None, (), False):
                raise UserError(
                    f"{where}: config {path} has {flag(name)} {value}, which the study sets in each run; leave it out"
                )
    return overlaid(sections, _flags(flags, f"{where}: flags"))


def _flags(tree: Mapping[str, Any] | None, where: str, *known: type) -> dict[str, Any]:
    """{field: value of its type}; of the sections `known`, or of all. Raises UserError for those that the study sets."""
    found = {}
    for name, value in (tree or {}).items():
        found[name] = typed_leaf(name, value, where, known)[1]
        if name in SET_BY_THE_STUDY:
            raise UserError(f"{where}: {flag(name)} is set by the study in each run; leave it out")
    return found


def _named(trees: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    for name in trees:
        refuse_unsafe(str(name), f"{where}:")
    return [(str(name), tree) for name, tree in trees.items()]


def _read(kind: type[T], tree: Any, where: str) -> T:
    """A dataclass from a mapping of YAML. A field of type dict takes any mapping. Raises UserError."""
    hints = get_type_hints(kind)
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected a mapping of {', '.join(hints)}, got {tree!r}")
    for key in tree:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key}{did_you_mean(str(key), hints)}; keys are {', '.join(hints)}")
    missing = [each.name for each in fields(kind) if each.default is MISSING and each.name not in tree]  # type: ignore[arg-type]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required")
    values = {key: _typed(value, hints[key], f"{where}: {key}") for key, value in tree.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if dict not in {get_origin(choice) for choice in choices}:
        return typed_value(value, hint, where)
    if value is None and type(None) in choices:
        return None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping, got {value!r}")
    return value
