"""The README.md of an exported model: what it is, and by which run it came to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_salt import __version__
from megatron_salt.checkpoint.run_state import CheckpointState
from megatron_salt.config import flag


def model_card(directory: Path, state: CheckpointState, config: Mapping[str, Any]) -> str:
    """Markdown with the provenance of a checkpoint."""
    rows = [
        ("architecture", config["architectures"][0]),
        ("checkpoint", directory.name),
        ("steps", state.run.step),
        ("samples", state.run.consumed_samples),
        ("context", state.seq_length),
        ("vocabulary", state.vocabulary_size),
        ("data", state.data_fingerprint),
        ("tokenizer", state.tokenizer),
        ("trained with", f"megatron_salt {__version__}, megatron-core {state.megatron_core}, torch {state.torch}"),
        *_salt_rows(state),
        *(("event", ", ".join(f"{key} {value}" for key, value in event.items())) for event in state.run.events),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {directory.name}\n\n| | |\n|---|---|\n{table}\n"


_SALT, _LET = "SALT, arXiv 2410.18779", "LET, arXiv 2602.05393"
METHODS = {"soft-labels": _SALT, "hidden": _LET, "both": f"{_SALT}, with {_LET}"}
"""By --guide."""


def _salt_rows(state: CheckpointState) -> list[tuple[str, Any]]:
    salt = state.run.salt
    if salt is None:
        return [("method", "plain pretraining")]
    rows: list[tuple[str, Any]] = [
        ("method", METHODS[salt.schedule.get("guide", "soft-labels")]),
        ("stage 1 ended after step", salt.stage1_end),
        ("teacher", salt.teacher or "none: stage 1 had a selection of the data"),
    ]
    return rows + [(flag(name), value) for name, value in salt.schedule.items()]
