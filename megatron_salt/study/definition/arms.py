"""From the kind of an arm to the flags of its run. Pure.

| kind     | stage 1 | after it |
|----------|---------|----------|
| baseline | none: plain training | |
| salt     | --kd-steps steps with the teacher | plain training |
| salt_ds  | the same, on the windows that an early teacher's scores choose | plain training |
| rkd      | the teacher teaches to the last step (reverse KD) | |
| ds_only  | salt_ds's windows with the plain loss: --kd-weight 0 and no teacher | plain training |
| gated    | salt, where only tokens inside --kd-gate have soft labels | plain training |
| random   | salt with as many random windows as salt_ds chooses; another choice for each seed | plain training |
| longer   | none: the baseline, and the steps that the teacher's training FLOPs buy | |
| let      | --let-steps steps in which the teacher's hidden states guide a layer (LET, arXiv 2602.05393): --guide hidden | plain training |
| salt_let | both: salt for --kd-steps, let for --let-steps; the teacher stays while either lasts: --guide both | plain training |
| grow     | none: the layers of a shallower trained model, stacked (G_stack, arXiv 2405.15319), trained on for the arm's steps | |

Runs of one seed are paired. They have one --seed, and so the same order of the data; and the same initial weights, except for grow,
whose weights come from a model that was trained with that seed and in that order. So grow reads the first samples of the order twice.
salt_ds, ds_only and random have an order of their own in stage 1, by the same seed. longer reads the baseline's samples in the
baseline's order and then goes on; its learning-rate schedule has its own length, so its losses differ from the first decay on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_salt.config import ModelConfig, RunConfig, SaltConfig, flag
from megatron_salt.config.run import field_types, sections
from megatron_salt.config.teaching import REPLACED_BY
from megatron_salt.errors import UserError
from megatron_salt.model.flops import flops_per_token
from megatron_salt.study.definition.study import Arm, Sections
from megatron_salt.study.results import Kind
from megatron_salt.train.plan import RunPlan, check

_OF_LET = frozenset({"let_weight", "let_layer", "let_steps", "let_decay"})
_OF_GATE = frozenset({"kd_gate"})
_EVERY = frozenset(field.name for field in fields(SaltConfig)) - {"teacher_load", "stage1_selection", "guide"} - _OF_GATE
_OF_SALT = _EVERY - _OF_LET
_OF_STAGE2 = frozenset({"stage2_data", "stage2_micro_batch_size"})
_OF_SCHEDULE = frozenset({"kd_steps", "kd_transition", "kd_transition_steps", "kd_stop", "kd_stop_margin"})

SALT_FLAGS: Mapping[Kind, frozenset[str]] = {
    "baseline": frozenset(),
    "salt": _OF_SALT - {"stage2_data"},
    "salt_ds": _OF_SALT,
    "rkd": _OF_SALT - _OF_SCHEDULE - _OF_STAGE2,
    "ds_only": frozenset({"kd_steps"}) | _OF_STAGE2,
    "random": _OF_SALT,
    "longer": frozenset(),
    "grow": frozenset(),
    "let": frozenset(name for name in _EVERY if not name.startswith("kd_") and "fp8" not in name)
    - {"stage2_data", "teacher_max_dropped_mass"},
    "gated": (_OF_SALT | _OF_GATE) - {"stage2_data"},
    "salt_let": _EVERY - {"stage2_data", "kd_stop", "kd_stop_margin"},
}
"""Fields of SaltConfig that a user may set for each kind. `salt:` and axes pass over the others."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What other jobs leave for a run. None: the arm's kind has no use for it."""

    teacher_load: str | None = None
    stage1_selection: str | None = None
    teacher_flops: float | None = None
    """FLOPs of the teacher's training"""
    vocabulary_size: int | None = None
    """Ids of the tokenizer"""


def overlaid(base: Sections, flags: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`base` with {field: value} over it."""
    homes = {field: name for name, section in sections().items() for field in field_types(section)}
    result = {name: dict(members) for name, members in base.items()}
    for field, value in flags.items():
        result.setdefault(homes[field], {})[field] = value
    return result


def build(settings: Sections) -> RunConfig:
    """The checked configuration of a run. Raises UserError."""
    return RunConfig(**{name: section(**settings.get(name, {})) for name, section in sections().items()})


def takes(arm: Arm, field: str) -> bool:
    """Whether a flag can mean anything to runs of an arm."""
    return field not in field_types(SaltConfig) or field in SALT_FLAGS[arm.kind]


def arm_flags(
    arm: Arm, salt: Mapping[str, Any], setting: Mapping[str, Any], base: Sections, ranks: int, inputs: Inputs
) -> dict[str, Any]:
    """{field: value} of an arm's runs over `base`.

    salt: the study's `salt:`. setting: {field: value} of one axis, or nothing. base: sections of the plain run. ranks: processes.
    Raises UserError.
    """
    unused = [name for name in arm.flags if not takes(arm, name)]
    if unused:
        raise UserError(f"kind {arm.kind} has no use for {' '.join(map(flag, unused))}")
    own = {name: value for name, value in salt.items() if takes(arm, name)} | {**arm.flags, **setting}
    if arm.kind == "gated" and own.get("kd_gate", "none") == "none":
        raise UserError("kind gated needs --kd-gate: without one its runs are those of kind salt")
    for name, schedule in REPLACED_BY.items():
        if name in setting and own.get(schedule):
            raise UserError(f"its runs would all be the same: {flag(schedule)} {' '.join(own[schedule])} stands in its place")
    if arm.kind in ("salt", "gated"):
        return own | {"teacher_load": inputs.teacher_load}
    if arm.kind in ("salt_ds", "random"):
        return own | {"teacher_load": inputs.teacher_load, "stage1_selection": inputs.stage1_selection}
    if arm.kind == "ds_only":
        return own | {"stage1_selection": inputs.stage1_selection, "kd_weight": 0.0}
    if arm.kind in ("let", "salt_let"):
        return own | {"teacher_load": inputs.teacher_load, "guide": "hidden" if arm.kind == "let" else "both"}
    if arm.kind == "rkd":
        plain = {name: value for name, value in own.items() if name not in _OF_SALT}
        _, plan = check(build(overlaid(base, plain)), ranks)
        return own | {"teacher_load": inputs.teacher_load, "kd_steps": plan.total_steps}
    if arm.kind == "longer":
        return own | longer(build(overlaid(base, own)), ranks, inputs)
    return own


def longer(baseline: RunConfig, ranks: int, inputs: Inputs) -> dict[str, Any]:
    """Flags of the length of a run that costs as much as the baseline and the teacher's training together. Raises UserError.

    A learning rate that decays to the baseline's last step decays to the last step of the longer run.
    """
    assert inputs.teacher_flops is not None
    assert inputs.vocabulary_size is not None
    _, plan = check(baseline, ranks)
    padded = baseline.model.padded_vocabulary_size(inputs.vocabulary_size)
    extra = steps_that_flops_buy(inputs.teacher_flops, baseline.model, baseline.training.seq_length, padded, plan)
    steps = plan.total_steps + extra
    in_samples = baseline.training.train_samples is not None
    length = steps * plan.global_batch_size if in_samples else steps
    flags: dict[str, Any] = {"train_samples" if in_samples else "train_iters": length}
    optimizer = baseline.optimizer
    if optimizer.lr_decay_samples is None and optimizer.lr_decay_iters is None:
        return flags
    name, value, end = "lr_decay_iters", optimizer.lr_decay_iters, plan.total_steps
    if optimizer.lr_decay_samples is not None:
        name, value, end = "lr_decay_samples", optimizer.lr_decay_samples, plan.total_samples
    if value != end:
        raise UserError(
            f"kind longer has a schedule of its own length, and {flag(name)} {value} is not the end of the baseline, {end}; leave "
            f"{flag(name)} out"
        )
    return flags | {name: end // plan.total_steps * steps}


def steps_that_flops_buy(flops: float, model: ModelConfig, seq_length: int, padded_vocabulary_size: int, plan: RunPlan) -> int:
    """Whole steps of plain training that `flops` pay for, rounded down."""
    step = flops_per_token(model, seq_length, padded_vocabulary_size) * seq_length * plan.global_batch_size
    return int(flops // step)


def training_flops(config: RunConfig, ranks: int, vocabulary_size: int) -> float:
    """FLOPs of forward and backward passes of a plain run, as its log counts them. Raises UserError."""
    _, plan = check(config, ranks)
    padded, length = config.model.padded_vocabulary_size(vocabulary_size), config.training.seq_length
    return flops_per_token(config.model, length, padded) * length * plan.total_samples
