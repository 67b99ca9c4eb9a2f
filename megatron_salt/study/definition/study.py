"""A study, as STUDY.yaml says it. Pure: `study_file.py` reads the file, `arms.py` and `plan_jobs.py` say what follows.

Settings of runs are kept as {section: {field: value}} with the types of RunConfig. Their own checks run when a run is planned.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_salt.config.checks import above_zero, at_least
from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.selection.score_format import columns
from megatron_salt.study.job import SlurmOptions
from megatron_salt.study.results import Kind

Sections = Mapping[str, Mapping[str, Any]]
"""{section: {field: value}} of a run: what is set over the defaults of RunConfig."""

KINDS: tuple[Kind, ...] = get_args(Kind)
WITH_TEACHER: tuple[Kind, ...] = ("salt", "salt_ds", "rkd", "random", "let", "salt_let", "gated")
"""Kinds whose runs load a teacher."""
WITH_SELECTION: tuple[Kind, ...] = ("salt_ds", "ds_only", "random")
"""Kinds whose stage 1 draws from chosen windows."""
NEED_TEACHER: tuple[Kind, ...] = (*WITH_TEACHER, "ds_only", "longer")
"""Kinds that a teacher stands behind: it teaches, has scored, or its training is what the longer baseline costs as much as."""

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher: a checkpoint that exists, or a configuration to train it as part of the study."""

    name: str
    """Its key in STUDY.yaml; `teacher` where there is one"""
    load: str | None = None
    """Directory of its checkpoints, or one iter_* directory"""
    sections: Sections | None = None
    """How to train it; None with `load`"""
    ranks: int = 1
    """Processes that train it"""
    training_flops: float | None = None
    """FLOPs of its training, where its checkpoint does not tell them. Only with `load`."""

    def __post_init__(self) -> None:
        if (self.load is None) == (self.sections is None):
            raise UserError("give either load (a checkpoint) or config (a YAML file, to train it)")
        if self.load is None and self.training_flops is not None:
            raise UserError("training_flops goes with load; of a teacher that the study trains they are computed")
        at_least(self, 1, "ranks")
        above_zero(self, "training_flops")


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """Which windows stage 1 draws from: those with the highest scores of an early teacher."""

    fraction: float
    """Share of the scored windows to choose, above 0 and up to 1"""
    score: str = "median_dropped_10"
    """Column of the score index, see docs/selection.md"""
    scorer_step: int | None = None
    """Step of the teacher whose checkpoint scores. None: its last"""
    sample: float | None = None
    """Score each window with this probability. None: score all"""
    exclude_duplicates: bool = False
    """Leave out windows with the same tokens as an earlier one"""
    allow_ties: bool = False
    """Accept a choice in which ties decide about more than 5% of the windows"""

    def __post_init__(self) -> None:
        at_least(self, 1, "scorer_step")
        known = [name for name, dtype in columns([self.top_k or 10], 1).items() if dtype.kind == "f"]
        if self.score not in known:
            hint = did_you_mean(self.score, known)
            raise UserError(
                f"there is no score {self.score}{hint}; scores are {', '.join(known)}, each also with another top K than these"
            )
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be above 0 and at most 1, got {self.fraction}")
        if self.sample is not None and not 0 < self.sample < 1:
            raise UserError(f"sample must be above 0 and below 1, got {self.sample}; without it every window is scored")

    @property
    def top_k(self) -> int | None:
        """K of a score of the tokens inside the teacher's top K; None: the score has none."""
        ending = self.score.rpartition("_")[2]
        return int(ending) if re.fullmatch("[1-9][0-9]{0,6}", ending) else None


@dataclass(frozen=True, kw_only=True)
class GrowSource:
    """The shallower model whose stacked layers an arm of kind grow begins with."""

    num_layers: int
    """Its layers; the student's number of layers is a multiple"""
    train_iters: int
    """Steps of its training, which the ledger counts"""
    flags: Mapping[str, Any]
    """{field of RunConfig: value} of its training over the arm's, such as a shorter warm-up"""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_layers", "train_iters")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One recipe. Its runs differ in the seed, and in the values of axes."""

    name: str
    kind: Kind
    flags: Mapping[str, Any]
    """{field of RunConfig: value} over the study's"""
    teacher: str | None = None
    """Name of its teacher; None: it has none"""
    selection: SelectionRule | None = None
    """Only of a kind that selects"""
    grow: GrowSource | None = None
    """Only of kind grow"""


@dataclass(frozen=True, kw_only=True)
class PrimaryQuestion:
    """The one comparison that may be answered with yes or no: `arm` against `against` in `figure` at the last step."""

    arm: str
    against: str
    figure: str = "valid/loss"
    """As in train.jsonl's evaluations: valid/loss, or valid/NAME/loss of a named set"""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Which figures the report shows, by the names of evaluations: valid/NAME/loss, valid/NAME/bits_per_byte, task/NAME/acc."""

    in_domain: tuple[str, ...] = ("valid/loss",)
    out_of_domain: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study: arms x seeds, and each axis by itself."""

    output: Path
    """Directory of the study"""
    sections: Sections
    """The base run: `config`, and `flags` over it. It has no teacher and no selection."""
    salt: Mapping[str, Any]
    """{field of SaltConfig: value} of every arm that has a stage 1"""
    ranks: int
    """Processes of each run"""
    seeds: tuple[int, ...]
    teachers: Mapping[str, Teacher]
    teacher_shared_by: int
    """M: runs that share the teacher's training in the third account of the ledger"""
    arms: tuple[Arm, ...]
    axes: Mapping[str, tuple[Any, ...]]
    """{field of RunConfig: values}. One axis at a time: a run has the base's value on all axes but at most one."""
    primary: PrimaryQuestion | None
    """None: nothing is answered with yes or no, as where a learning rate is chosen"""
    figures: Figures
    slurm: SlurmOptions | None
    """Where its jobs run with --slurm; None: the file does not say"""

    def __post_init__(self) -> None:
        at_least(self, 1, "ranks", "teacher_shared_by")
        if str(self.output) == "." or any(unicodedata.category(character) == "Cc" for character in str(self.output)):
            raise UserError(
                f"output: {str(self.output)!r} is no name of a directory for a study; give another, such as runs/study"
            )
        if not self.seeds:
            raise UserError("seeds: give at least one, such as [1, 2, 3]")
        repeated = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if repeated:
            raise UserError(f"seeds: {', '.join(map(str, repeated))} is given twice")
        if min(self.seeds) < 0:
            raise UserError(f"seeds: must be at least 0, got {min(self.seeds)}")
        if not self.arms:
            raise UserError("arms: give at least one, such as baseline")
        for arm in self.arms:
            _check_arm(arm, self.teachers)
        if self.primary is not None:
            _check_primary(self.primary, [arm.name for arm in self.arms])

    def arm(self, name: str) -> Arm:
        """The arm of this name, which is one of the study's."""
        return next(arm for arm in self.arms if arm.name == name)


def refuse_unsafe(name: str, where: str) -> None:
    """Raise UserError for a name that is no safe name of a directory."""
    if not _SAFE.fullmatch(name):
        raise UserError(
            f"{where} {name!r} becomes the name of a directory: use letters, digits, - and _, from a letter or digit on"
        )


def _check_primary(primary: PrimaryQuestion, arms: Sequence[str]) -> None:
    for role, name in (("arm", primary.arm), ("against", primary.against)):
        if name not in arms:
            raise UserError(f"primary.{role}: there is no arm {name}{did_you_mean(name, arms)}; arms are {', '.join(arms)}")
    if primary.arm == primary.against:
        raise UserError(f"primary: arm and against are both {primary.arm}")


def _check_arm(arm: Arm, teachers: Mapping[str, Teacher]) -> None:
    where = f"arms.{arm.name}"
    if arm.kind in NEED_TEACHER and arm.teacher is None:
        raise UserError(
            f"{where}: kind {arm.kind} needs a teacher: give teacher: with load: or config:"
            + (f", or name one of {', '.join(teachers)} here" if teachers else "")
        )
    if arm.teacher is not None and arm.teacher not in teachers:
        raise UserError(f"{where}.teacher: there is no teacher {arm.teacher}{did_you_mean(arm.teacher, teachers)}")
    if arm.kind in WITH_SELECTION and arm.selection is None:
        raise UserError(f"{where}: kind {arm.kind} chooses windows: give selection: with at least fraction:")
    if arm.kind == "grow" and arm.grow is None:
        raise UserError(f"{where}: kind grow needs grow: with num_layers and train_iters of the model that is stacked")
    for name, kinds in (("teacher", NEED_TEACHER), ("selection", WITH_SELECTION), ("grow", ("grow",))):
        if getattr(arm, name) is not None and arm.kind not in kinds:
            raise UserError(f"{where}.{name}: kind {arm.kind} has none; it goes with {', '.join(kinds)}")
