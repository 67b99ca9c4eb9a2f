"""state.json and evaluated.json: checkpoints of earlier releases are read, and the same bytes are written.

`old/` was written by release 0.1.0 before the state had types. Its run had a teacher and a selection for three steps of six, saved every
second step, and was evaluated there. `iter_0000004` is whole; of `iter_0000002`, in stage 1, only the state was kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.checkpoint.integrity import DamagedCheckpoint
from megatron_salt.checkpoint.run_state import ReferenceLosses, RunState, SaltState
from megatron_salt.checkpoint.save_directory import STATE
from megatron_salt.checkpoint.state_file import EVALUATED, parse_state, read_state, state_content, write_evaluation, write_state
from megatron_salt.errors import UserError
from tests.support.program import SEQ_LENGTH, entries, losses, state_of, train, write_tokens
from tests.support.selections import write_ids

OLD = Path(__file__).parent / "old"
SIZES: dict[str, Any] = dict(hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2, num_layers=1)
SCHEDULE = dict(
    kd_steps=3, kd_weight=0.667, kd_teacher_temperature=0.25, kd_transition="step", kd_transition_steps=0, kd_stop="steps",
    kd_stop_margin=0.0,
)  # fmt: skip
STAGE_1 = SaltState(
    stage1_end=3, schedule=SCHEDULE, teacher="sha256:0519c6fa48ee42248a72c2444669b6f1",
    teacher_directory="teacher/iter_0000006", teacher_held_out={"loss": 4.889503479003906, "accuracy": 0.1484375},
)  # fmt: skip


def old_content(step: int) -> dict[str, Any]:
    return json.loads((OLD / f"iter_{step:07d}" / STATE).read_bytes())


@pytest.mark.parametrize(
    "step, expected",
    [
        (2, RunState(step=2, consumed_samples=16, position=16, teacher_flops=None, salt=STAGE_1)),
        (4, RunState(step=4, consumed_samples=32, position=32, stage2_since=24, teacher_flops=None, salt=STAGE_1)),
    ],
)
def test_an_old_checkpoint_says_where_its_run_was(step: int, expected: RunState) -> None:
    """After its evaluation, and before it as well."""
    directory = OLD / f"iter_{step:07d}"
    assert read_state(directory).run == expected
    before = parse_state(old_content(step)).run
    assert before.evaluation_due and (before.salt == replace(STAGE_1, teacher_held_out=None)) is (step == 2)


@pytest.mark.parametrize("step", [2, 4])
def test_state_json_is_written_byte_for_byte_as_before(step: int) -> None:
    assert state_content(parse_state(old_content(step))) == (OLD / f"iter_{step:07d}" / STATE).read_bytes()


@pytest.mark.parametrize("step", [2, 4])
def test_evaluated_json_is_written_byte_for_byte_as_before(tmp_path: Path, step: int) -> None:
    directory = OLD / f"iter_{step:07d}"
    write_evaluation(tmp_path, read_state(directory).run)
    assert (tmp_path / EVALUATED).read_bytes() == (directory / EVALUATED).read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = replace(
        read_state(OLD / "iter_0000004"),
        name="save-at",
        reference_losses=None,
        optimizer=None,
        scheduler=None,
        run=RunState(
            step=7,
            consumed_samples=56,
            nonfinite_in_a_row=2,
            evaluation_due=True,
            due=("held_out", "tasks"),
            teacher_flops=2.5e17,
            events=({"event": "start"},),
        ),
    )
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    converted = replace(state, reference_losses=ReferenceLosses((16, 32), (5.5, None), "float32", "this program alone"))
    assert parse_state(json.loads(state_content(converted))) == converted
    salt = replace(STAGE_1, crossover=7)
    write_evaluation(tmp_path, replace(state.run, salt=salt))
    assert read_state(tmp_path) == replace(state, run=replace(state.run, salt=salt, evaluation_due=False, due=()))


@pytest.mark.parametrize(
    "change", [{"step": 3}, {"salt": {"stage1_end": 3}}, {"salt": None, "and": 1}, {"salt": "none"}, {"step": None}]
)
def test_an_evaluation_that_was_not_written_for_this_checkpoint_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    directory = shutil.copytree(OLD / "iter_0000002", tmp_path / "iter_0000002")
    written = json.loads((directory / EVALUATED).read_bytes())
    (directory / EVALUATED).write_text(json.dumps(written | {"decided": written["decided"] | change}))
    with pytest.raises(DamagedCheckpoint, match="without the file a resumed run repeats the evaluation"):
        read_state(directory)


@pytest.mark.parametrize("change", [{"format": "1\n2"}, {"salt": {"a\nname": 1}}, {"layout": {"tensor": "\x1e"}}])
def test_a_refusal_is_one_line_whatever_the_file_holds(tmp_path: Path, change: dict[str, Any]) -> None:
    content = json.loads((OLD / "iter_0000002/state.json").read_bytes())
    (tmp_path / "state.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError) as refused:
        read_state(tmp_path)
    assert str(refused.value).isprintable() and str(tmp_path / "state.json") in str(refused.value)


def test_a_run_resumes_from_an_old_checkpoint_and_comes_to_the_same(tmp_path: Path) -> None:
    """The losses of steps 5 and 6 are those of the run that wrote it, and its evaluation at step 4 is not repeated."""
    data, valid = write_tokens(tmp_path / "words"), write_tokens(tmp_path / "valid", windows=16, seed=3)
    chosen = write_ids(tmp_path / "chosen", [data], SEQ_LENGTH, list(range(0, 22, 2)))
    train(
        **SIZES, data_path=data, valid_data_path=valid, eval_iters=1, eval_interval=2, train_iters=6, teacher_load="teacher",
        kd_steps=3, stage1_selection=chosen, load=OLD / "iter_0000004", save=tmp_path / "run",
    )  # fmt: skip
    assert losses(tmp_path / "run") == pytest.approx({5: 5.4387712478637695, 6: 5.424039363861084}, rel=1e-5)
    assert [entry["step"] for entry in entries(tmp_path / "run", "eval")] == [6]
    old, new = old_content(4), state_of(tmp_path / "run", 6)
    assert list(new) == list(old) and new["data"] == {"position": 48, "stage2_since": 24}
    assert list(new["extra"]) == list(old["extra"]) and new["lineage"][0] == old["lineage"][0]
