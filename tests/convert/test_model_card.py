"""The card of an exported model names the method of its run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.convert.hugging_face.model_card import model_card

OLD = Path(__file__).parents[1] / "checkpoint" / "old" / "iter_0000004"


@pytest.mark.parametrize("guidance, method", [
    ({}, "SALT, arXiv 2410.18779"),
    ({"guide": "hidden", "let_steps": 3}, "LET, arXiv 2602.05393"),
    ({"guide": "both", "let_steps": 3}, "SALT, arXiv 2410.18779, with LET, arXiv 2602.05393"),
])  # fmt: skip
def test_a_card_names_what_the_teacher_taught(guidance: dict[str, object], method: str) -> None:
    """A schedule without guidance says nothing of it, as before there was any."""
    state = read_state(OLD)
    assert state.run.salt is not None
    salt = replace(state.run.salt, schedule=state.run.salt.schedule | guidance)
    card = model_card(Path("iter_0000004"), replace(state, run=replace(state.run, salt=salt)), {"architectures": ["Llama"]})
    assert f"| method | {method} |" in card and ("| --let-steps | 3 |" in card) == bool(guidance)
