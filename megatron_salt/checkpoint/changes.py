"""Which flags of a run changed since its checkpoint. The checkpoint's run.yaml is compared as a whole with this run's.

Flags that make another run are refused elsewhere (compatibility.py, salt/schedule.py). Every other flag that shapes the training, and
that a user may change, is reported, unless `NOT_REPORTED` names it. So a new flag is reported without further work. Not collective.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_salt import yaml_core
from megatron_salt.checkpoint.save_directory import RUN_YAML
from megatron_salt.config import flag
from megatron_salt.config.run import sections
from megatron_salt.small_files import read_small

CHANGED = "changed"
"""Kind of an entry in RunState.events with the keys "event", "step", "flag", "from" and "to"."""

NOT_REPORTED_SECTIONS = {"model", "tokenizer", "checkpoint", "logging"}
"""Model and tokenizer are refused where they differ, checkpoint and logging are about files."""

SCHEDULE_SECTION, NO_SCHEDULE = "optimizer", {"adam_beta1", "adam_beta2", "adam_eps", "clip_grad"}
"""Under --use-checkpoint-opt-param-scheduler only these flags of the section are used."""

NOT_REPORTED_BEGINNINGS, NOT_REPORTED_ENDINGS = (
    ("allow_", "profile", "manual_gc"),
    ("_file", "_interval", "_minutes", "_in_mins"),
)
"""Beginnings and endings of names, in every section: flags that only let a run start, watch it, or end it."""

NOT_REPORTED = {
    "training": {"exit_signal_handler", "loss_chunk_tokens", "loss_chunk_mib"},
    "parallel": {"recompute_granularity", "recompute_method", "recompute_num_layers", "overlap_grad_reduce", "overlap_param_gather"},
    "optimizer": {"override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"},
    "data": {"data_path", "verify_data"},  # other data is refused, or an event of its own
    "salt": {  # another teacher or schedule likewise
        "teacher_load", "teacher_cache", "teacher_exchange_max_gib", "teacher_fp8_max_kl", "teacher_max_dropped_mass", "stage1_selection",
        "override_kd_schedule", "kd_weight", "kd_teacher_temperature", "kd_steps", "kd_transition", "kd_transition_steps",
        "kd_stop", "kd_stop_margin", "guide", "let_weight", "let_layer", "let_steps", "let_decay",
        "kd_gate", "kd_weight_schedule", "kd_temperature_schedule",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One flag that changed. Values as YAML has them; None: not given."""

    name: str
    saved: Any
    current: Any

    def event(self, step: int) -> dict[str, Any]:
        """The entry of RunState.events. step: the checkpoint's."""
        return {"event": CHANGED, "step": step, "flag": flag(self.name), "from": self.saved, "to": self.current}


def tell(event: Mapping[str, Any]) -> str:
    """One line about an event of kind `CHANGED`."""
    return (
        f"changed since the checkpoint of step {event['step']}: {event['flag']} {_word(event['from'])} -> {_word(event['to'])}"
    )


def changes_since(directory: Path, current: str) -> list[Change]:
    """The flags that changed since the checkpoint in `directory`. current: this run's run.yaml."""
    try:
        saved = yaml_core.load(read_small(directory / RUN_YAML).decode())
    except (OSError, ValueError):
        return []  # another release wrote it: the checksums have been verified
    return changes(saved, yaml_core.load(current))


def changes(saved: Any, current: Any) -> list[Change]:
    """The flags that differ between two trees, {section: {leaf: value}}. A flag that an earlier release did not know had its default.
    Pure."""
    schedule_used = not _section(current, SCHEDULE_SECTION).get("use_checkpoint_opt_param_scheduler", False)
    return [
        Change(name, before, after)
        for section, name, default in reported_leaves()
        if schedule_used or section != SCHEDULE_SECTION or name in NO_SCHEDULE
        if (before := _section(saved, section).get(name, default)) != (after := _section(current, section).get(name, default))
    ]


def reported_leaves() -> Iterator[tuple[str, str, Any]]:
    """(section, name, default) of every flag whose change is reported."""
    for section, members in sections().items():
        for leaf in fields(members):
            if section in NOT_REPORTED_SECTIONS or leaf.name in NOT_REPORTED.get(section, ()):
                continue
            if not leaf.name.startswith(NOT_REPORTED_BEGINNINGS) and not leaf.name.endswith(NOT_REPORTED_ENDINGS):
                yield section, leaf.name, list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default


def _section(tree: Any, name: str) -> Mapping[str, Any]:
    section = tree.get(name) if isinstance(tree, dict) else None
    return section if isinstance(section, dict) else {}


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
