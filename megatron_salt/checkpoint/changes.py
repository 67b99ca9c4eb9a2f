"""Which flags of a run changed since its checkpoint. The checkpoint's run.yaml is compared as a whole with this run's.

Flags that make another run are refused elsewhere (compatibility.py, salt/schedule.py). Every other flag that shapes the training, and
that a user may change, is reported, unless `UNTOLD` names it. So a new flag is reported without further work. Not collective.
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
"""The kind of event in RunState.events: "event", "step", "flag", "from", "to"."""

UNTOLD_SECTIONS = {"model", "tokenizer", "checkpoint", "logging"}
"""Model and tokenizer are refused where they differ, checkpoint and logging are about files."""

SCHEDULE_SECTION, NO_SCHEDULE = "optimizer", {"adam_beta1", "adam_beta2", "adam_eps", "clip_grad"}
"""Under --use-checkpoint-opt-param-scheduler the flags of this section are not used, but for these."""

UNTOLD_BEGINNINGS, UNTOLD_ENDINGS = ("allow_", "profile", "manual_gc"), ("_file", "_interval", "_minutes", "_in_mins")
"""Of names, in every section: what only lets a run start, watches it, or ends it."""

UNTOLD = {
    "training": {"exit_signal_handler", "loss_chunk_tokens", "loss_chunk_mib"},
    "parallel": {"recompute_granularity", "recompute_method", "recompute_num_layers", "overlap_grad_reduce", "overlap_param_gather"},
    "optimizer": {"override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"},
    "data": {"data_path", "verify_data"},  # other data is refused, or an event of its own
    "salt": {  # another teacher or schedule likewise
        "teacher_load", "teacher_exchange_max_gib", "teacher_fp8_max_kl", "stage1_selection", "override_kd_schedule", "kd_weight",
        "kd_teacher_temperature", "kd_steps", "kd_transition", "kd_transition_steps", "kd_stop", "kd_stop_margin",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One flag. Values as YAML has them; None: not given."""

    name: str
    there: Any
    here: Any

    def event(self, step: int) -> dict[str, Any]:
        """What RunState.events remembers of it. step: the checkpoint's."""
        return {"event": CHANGED, "step": step, "flag": flag(self.name), "from": self.there, "to": self.here}


def tell(event: Mapping[str, Any]) -> str:
    """Such an event in a line."""
    return (
        f"changed since the checkpoint of step {event['step']}: {event['flag']} {_word(event['from'])} -> {_word(event['to'])}"
    )


def changes_since(directory: Path, here: str) -> list[Change]:
    """The flags that changed since the checkpoint in `directory`. here: this run's run.yaml."""
    try:
        there = yaml_core.load(read_small(directory / RUN_YAML).decode())
    except (OSError, ValueError):
        return []  # of another release, then: checksums have been looked at
    return changes(there, yaml_core.load(here))


def changes(there: Any, here: Any) -> list[Change]:
    """The same of two trees, {section: {leaf: value}}. What an earlier release did not know yet had its default. Pure."""
    schedule_used = not _section(here, SCHEDULE_SECTION).get("use_checkpoint_opt_param_scheduler", False)
    return [
        Change(name, before, after)
        for section, name, default in told_leaves()
        if schedule_used or section != SCHEDULE_SECTION or name in NO_SCHEDULE
        if (before := _section(there, section).get(name, default)) != (after := _section(here, section).get(name, default))
    ]


def told_leaves() -> Iterator[tuple[str, str, Any]]:
    """(section, name, default) of every flag that is worth a line."""
    for section, members in sections().items():
        for leaf in fields(members):
            if section in UNTOLD_SECTIONS or leaf.name in UNTOLD.get(section, ()):
                continue
            if not leaf.name.startswith(UNTOLD_BEGINNINGS) and not leaf.name.endswith(UNTOLD_ENDINGS):
                yield section, leaf.name, list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default


def _section(tree: Any, name: str) -> Mapping[str, Any]:
    section = tree.get(name) if isinstance(tree, dict) else None
    return section if isinstance(section, dict) else {}


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
