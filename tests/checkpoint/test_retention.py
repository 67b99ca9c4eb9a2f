"""Which run a checkpoint belongs to, what --keep-last deletes, where a run may start. On directories without tensors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.checkpoint import retention, save_directory
from megatron_salt.checkpoint.retention import Saved, is_ancestor
from megatron_salt.checkpoint.run_state import UNNAMED, Lineage, lineage_in
from megatron_salt.config import CheckpointConfig
from megatron_salt.errors import UserError

A: Lineage = (("a", 0),)
B: Lineage = (("a", 0), ("b", 10))  # rewound to step 10 of A
C: Lineage = (("a", 0), ("b", 10), ("c", 20))
OTHER: Lineage = (("x", 0),)


def put(root: Path, step: int, **values: Any) -> Path:
    """Write a checkpoint without tensors, and let the tracker name it. values: of state.json."""
    directory = save_directory.directory_of(root, step)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / save_directory.STATE).write_text(json.dumps({"step": step, "name": None} | values))
    save_directory.write_tracker(root, step)
    return directory


@pytest.mark.parametrize(
    "there, step, mine, at, own",
    [
        (A, 10, A, 30, True),
        (A, 40, A, 30, False),  # later than where the run is
        (A, 10, B, 30, True),
        (A, 20, B, 30, False),  # abandoned by the rewind
        (B, 20, B, 30, True),
        (B, 20, A, 30, False),  # the branch of another start
        (B, 20, C, 30, True),
        (B, 30, C, 40, False),
        (A, 10, C, 40, True),
        ((("b", 10),), 20, B, 30, False),
        (OTHER, 10, A, 30, False),
        ((), 10, A, 30, False),
        (UNNAMED, 10, A, 30, False),
        (UNNAMED, 10, (*UNNAMED, ("a", 20)), 30, True),
        (UNNAMED, 30, (*UNNAMED, ("a", 20)), 30, False),
    ],
)
def test_whose_a_checkpoint_is(there: Lineage, step: int, mine: Lineage, at: int, own: bool) -> None:
    assert is_ancestor(there, step, mine, at) is own


@pytest.mark.parametrize(
    "said",
    [
        None,
        7,
        "ab",
        ["a"],
        [["a"]],
        [["a", 5]],
        [["a", 0.0]],
        [["a", 0], ["b", True]],
        [[1, 0]],
        [["a", 0], ["b", 20], ["c", 10]],
        {"a": 0},
    ],
)
def test_a_lineage_that_says_nonsense_is_nobodys(said: Any) -> None:
    assert lineage_in({"lineage": said}) == ()
    assert lineage_in({}) == UNNAMED and lineage_in([]) == ()
    assert lineage_in(json.loads(json.dumps({"lineage": C}))) == C


def test_a_resumed_run_goes_on_under_its_id_and_a_second_continuation_branches_off() -> None:
    others = [(A, 5), (A, 10), (OTHER, 30)]
    assert retention.resumed(A, 10, True, others) == A
    for branch in (
        retention.resumed(A, 10, True, [*others, (A, 15)]),
        retention.resumed(A, 10, True, [*others, ((*A, ("b", 15)), 30)]),
        retention.resumed(A, 10, False, others),
    ):
        assert branch[:-1] == A and branch[-1][1] == 10 and len({name for name, _ in branch}) == 2
    assert retention.resumed(A, 20, True, [(B, 30)]) == A  # that one left before
    (mine,) = retention.resumed((), 10, True, [])
    assert mine[1] == 0


def test_unnamed_checkpoints_are_own_only_where_the_run_resumed_from_one_of_them_in_place() -> None:
    assert retention.resumed(UNNAMED, 10, True, [])[:-1] == UNNAMED
    assert len(retention.resumed(UNNAMED, 10, False, [])) == 1
    elsewhere = retention.resumed((*UNNAMED, ("a", 10), ("b", 20)), 30, False, [])
    assert elsewhere[:-1] == (("a", 0), ("b", 20)) and lineage_in({"lineage": elsewhere}) == elsewhere


SAVED = [
    Saved(10, None, A),
    Saved(15, None, OTHER),
    Saved(20, None, A),
    Saved(25, "save-at", B),
    Saved(30, None, B),
    Saved(35, None, ()),
    Saved(40, None, B),
    Saved(50, None, A),
]


@pytest.mark.parametrize(
    "keep, latest, mine, gone",
    [
        (1, 40, B, [10, 30]),
        (2, 40, B, [10]),
        (3, 40, B, []),
        (9, 40, B, []),
        (1, 50, A, [10, 20]),
        (1, 15, OTHER, []),
        (1, 30, B, [10]),
    ],
)
def test_keep_last_goes_by_step_inside_the_lineage(keep: int, latest: int, mine: Lineage, gone: list[int]) -> None:
    for _ in range(5):
        assert retention.surplus(random.sample(SAVED, len(SAVED)), keep, latest, mine) == gone


def test_the_checkpoint_just_saved_is_never_deleted() -> None:
    assert retention.surplus([Saved(10, None, A), Saved(30, None, ())], 1, 10, A) == []
    assert retention.surplus([Saved(step, None, UNNAMED) for step in (10, 20)], 1, 20, UNNAMED) == [10]


def test_what_cannot_be_read_is_nobodys(tmp_path: Path) -> None:
    for step, content in ((1, "{"), (2, "[]"), (3, '{"step": 3}'), (4, None)):
        directory = put(tmp_path, step, lineage=A)
        (directory / save_directory.STATE).unlink() if content is None else (directory / save_directory.STATE).write_text(
            content
        )
    assert {one.lineage for one in retention.saved_under(tmp_path)} == {()}


def config(save: Path, load: Path | None = None, **flags: Any) -> CheckpointConfig:
    return CheckpointConfig(save=str(save), load=None if load is None else str(load), **flags)


def begin(flags: CheckpointConfig) -> Lineage:
    """Decide the lineage as a start does: once before anything is loaded, and once after."""
    retention.refuse_foreign(flags)
    origin = None
    if flags.load is not None and not flags.finetune:
        path = save_directory.candidates(Path(flags.load))[0]
        state = json.loads((path / save_directory.STATE).read_text())
        origin = retention.Origin(path, state["step"], lineage_in(state))
    return retention.begin(flags, origin)


def test_a_fresh_run_into_a_used_directory_is_refused_unless_a_flag_says_so(tmp_path: Path) -> None:
    run, empty, elsewhere = tmp_path / "run", tmp_path / "empty", tmp_path / "elsewhere"
    for step in (5, 10):
        put(run, step, lineage=A)
    put(elsewhere, 7, lineage=OTHER)
    with pytest.raises(UserError) as refused:
        begin(config(run))
    for part in (
        f"--save {run} holds checkpoints of another run (2: iter_0000005 to iter_0000010)",
        "starts at step 0",
        f"--load {run} goes on from them",
        "another --save",
        "--overwrite-save",
    ):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    for flags in (config(run, run, finetune=True), config(run, elsewhere, finetune=True), config(run, elsewhere)):
        with pytest.raises(UserError, match="--overwrite-save"):
            begin(flags)
    assert begin(config(run, run)) == A
    assert len(begin(config(empty))) == 1 and begin(config(empty, elsewhere))[:-1] == OTHER
    assert begin(config(run, overwrite_save=True)) not in (A, OTHER)
    assert begin(config(run, elsewhere, overwrite_save=True))[:-1] == OTHER


def test_a_directory_of_checkpoints_that_are_not_ours_is_used_too(tmp_path: Path) -> None:
    (tmp_path / "iter_0000100").mkdir()
    with pytest.raises(UserError, match="iter_0000100"):
        begin(config(tmp_path))
    (tmp_path / "iter_0000100").rename(tmp_path / "iter_0000100.partial")
    begin(config(tmp_path))


def test_the_same_command_started_again_does_not_lose_what_it_saved_elsewhere(tmp_path: Path) -> None:
    """With --load A --save B every start goes back to A, so the second start would replace the checkpoints of the first."""
    there, here = tmp_path / "a", tmp_path / "b"
    put(there, 10, lineage=A)
    mine = begin(config(here, there))
    put(here, 20, lineage=mine)
    with pytest.raises(UserError, match="does not come from"):
        begin(config(here, there))
    assert begin(config(here, here)) == mine


def test_a_rewind_in_place_leaves_the_abandoned_branch_alone(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        put(tmp_path, step, lineage=A)
    mine = begin(config(tmp_path, tmp_path / "iter_0000010"))
    assert mine[:-1] == A
    put(tmp_path, 15, lineage=mine)
    put(tmp_path, 25, lineage=mine)
    assert retention.surplus(retention.saved_under(tmp_path), 1, 25, mine) == [10, 15]
    before = [path.name for path in retention.of_one_run(save_directory.candidates(tmp_path))]
    assert before == ["iter_0000025", "iter_0000015", "iter_0000010"]  # what --load-fallback may try
    assert begin(config(tmp_path, tmp_path)) == mine


def test_a_checkpoint_that_is_a_link_is_where_the_link_is(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", 10, lineage=A)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/iter_0000010").symlink_to(tmp_path / "elsewhere/iter_0000010")
    assert begin(config(tmp_path / "run", tmp_path / "run")) == A
