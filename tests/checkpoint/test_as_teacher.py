"""A checkpoint as a teacher: its fingerprint names its contents, and errors name --teacher-load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_salt.checkpoint import integrity, loading, save_directory
from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.errors import UserError
from megatron_salt.salt.teacher_checkpoint import read_teacher
from tests.support.checkpoint_runs import SHARDED, TINY, Run, flip, job, rewrite
from tests.support.ranks import RankError, run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2 of a run."""
    directory = tmp_path_factory.mktemp("teacher")
    run_ranks(1, job, Run(save=str(directory), parallel=SHARDED), 1, 2, (1, 2))
    return directory


def test_the_fingerprint_is_of_the_contents_wherever_they_lie(saved: Path, tmp_path: Path) -> None:
    one, two = (loading.checkpoint_fingerprint(save_directory.directory_of(saved, step)) for step in (1, 2))
    assert one != two and one.startswith("sha256:")
    copy = shutil.copytree(save_directory.directory_of(saved, 2), tmp_path / "elsewhere" / "iter_0000002")
    assert loading.checkpoint_fingerprint(copy) == two
    sums = integrity.read_checksums(copy)
    for name in ("__0_0.distcp", "run.yaml", save_directory.STATE):  # weights, configuration, facts
        other = integrity.FileSum(sums[name].size, "0" * 64)
        integrity.write_checksums(copy, sums | {name: other})
        assert loading.checkpoint_fingerprint(copy) not in (one, two)


def test_what_an_earlier_release_did_not_record_is_none(saved: Path, tmp_path: Path) -> None:
    content = json.loads((save_directory.directory_of(saved, 2) / save_directory.STATE).read_bytes())
    assert {"probe", "salt"} <= content.keys()
    old = {name: value for name, value in content.items() if name not in ("probe", "salt")}
    (tmp_path / save_directory.STATE).write_text(json.dumps(old))
    state = read_state(tmp_path)
    assert state.reference_losses is None and state.run.salt is None
    assert state == read_state(save_directory.directory_of(saved, 2))


def unreadable(directory: Path) -> str:
    (directory / save_directory.STATE).write_text("{")
    return "state.json: cannot be read"


def no_object(directory: Path) -> str:
    (directory / save_directory.STATE).write_text("[1]")
    return "state.json: cannot be read"


def missing(directory: Path) -> str:
    (directory / save_directory.STATE).unlink()
    return "state.json: No such file or directory, so this is no whole checkpoint"


def of_the_future(directory: Path) -> str:
    (directory / save_directory.STATE).write_text(json.dumps({"format": 2}))
    return "state.json has format 2; this release reads format 1"


@pytest.mark.parametrize("spoil", [unreadable, no_object, missing, of_the_future])
def test_facts_that_cannot_be_read_are_a_users_error(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    (tmp_path / save_directory.STATE).write_text("{}")
    message = spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        read_state(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and message in str(caught.value)


# ---- opened under another flag -------------------------------------------------------------------------------------------


def open_as_teacher(directory: Path) -> bool:
    return loading.open_checkpoint(directory, fallback=False, flag_name="--teacher-load") is not None


def truncated_shard(root: Path) -> str:
    path = save_directory.directory_of(root, 2) / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:100])
    return f"{path}: has 100 bytes"


def flipped_state(root: Path) -> str:
    flip(save_directory.directory_of(root, 2) / save_directory.STATE, 30)
    return str(save_directory.directory_of(root, 2) / save_directory.STATE)


def no_checksums(root: Path) -> str:
    (save_directory.directory_of(root, 2) / integrity.CHECKSUMS).unlink()
    return f"{integrity.CHECKSUMS}: is missing, so this is no whole checkpoint of megatron_salt"


def lost(root: Path) -> str:
    shutil.rmtree(save_directory.directory_of(root, 2))
    return "names step 2"


def rubbish_tracker(root: Path) -> str:
    (root / save_directory.TRACKER).write_text("two")
    return "does not hold the number of a step"


@pytest.mark.parametrize("spoil", [truncated_shard, flipped_state, no_checksums, lost, rubbish_tracker])
def test_a_damaged_teacher_is_refused_under_the_name_of_its_flag(
    saved: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    """And no message names --load-fallback: an earlier checkpoint would be another teacher."""
    root = shutil.copytree(saved, tmp_path / "teacher")
    message = spoil(root)
    with pytest.raises(RankError) as caught:
        run_ranks(1, open_as_teacher, root)
    told = str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, UserError) and message in told and "--teacher-load" in told
    assert "--load" not in told.replace("--teacher-load", "") and "fallback" not in told


def test_a_save_that_was_never_finished_is_refused_under_the_name_of_its_flag(tmp_path: Path) -> None:
    partial = save_directory.partial_of(tmp_path, 3)
    partial.mkdir()
    with pytest.raises(UserError, match=f"^--teacher-load {partial}: a save that was never finished"):
        save_directory.candidates(partial, flag_name="--teacher-load")


def test_a_whole_one_opens_and_nothing_is_nothing(saved: Path, tmp_path: Path) -> None:
    assert run_ranks(1, open_as_teacher, saved) == [True]
    assert run_ranks(1, open_as_teacher, tmp_path / "nowhere") == [False]


# ---- read by a student's run ---------------------------------------------------------------------------------------------


RECORD = {"lengths": [16, 32], "losses": [5.5, 5.75], "dtype": "float32"}


def test_a_teacher_is_what_its_checkpoint_says(saved: Path, tmp_path: Path) -> None:
    """Its architecture comes from there; a field that an earlier release did not know has its default."""
    directory = shutil.copytree(save_directory.directory_of(saved, 2), tmp_path / "iter_0000002")
    architecture = {name: value for name, value in asdict(TINY).items() if name != "qk_layernorm"}
    rewrite(directory, probe=RECORD, architecture=architecture | {"seq_length": 32, "vocabulary": 250})
    teacher = read_teacher(str(tmp_path))
    assert (
        teacher.directory == directory and teacher.model == TINY and (teacher.vocabulary_size, teacher.seq_length) == (250, 32)
    )
    assert teacher.tokenizer_fingerprint == "tokenizer:aaaa" and teacher.fingerprint == loading.checkpoint_fingerprint(
        directory
    )
    assert (teacher.lengths, teacher.losses, teacher.dtype) == ((16, 32), (5.5, 5.75), "float32")


def no_probe(root: Path) -> str:
    rewrite(save_directory.directory_of(root, 2), probe=None)
    return "has no record of its own loss"


def no_probe_of_before(root: Path) -> str:
    rewrite(save_directory.directory_of(root, 2), probe=...)
    return "has no record of its own loss"


def not_finite(root: Path) -> str:
    rewrite(save_directory.directory_of(root, 2), probe=RECORD | {"losses": [5.5, None]})
    return "was not finite"


def no_state(root: Path) -> str:
    (save_directory.directory_of(root, 2) / save_directory.STATE).unlink()
    return f"{save_directory.directory_of(root, 2) / save_directory.STATE}: No such file"


def something_else(root: Path) -> str:
    shutil.rmtree(root)
    root.mkdir()
    (root / "model.safetensors").touch()
    return f"{root} holds no checkpoint"


def nowhere(root: Path) -> str:
    shutil.rmtree(root)
    return f"{root} holds no checkpoint"


def a_file(root: Path) -> str:
    shutil.rmtree(root)
    root.touch()
    return f"{root} holds no checkpoint"


@pytest.mark.parametrize(
    "spoil",
    [no_probe, no_probe_of_before, not_finite, no_state, no_checksums, something_else, nowhere, a_file, lost, rubbish_tracker],
)
def test_a_directory_that_cannot_teach_is_refused_in_one_line(
    saved: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    root = shutil.copytree(saved, tmp_path / "teacher")
    message = spoil(root)
    with pytest.raises(UserError) as caught:
        read_teacher(str(root))
    told = str(caught.value)
    assert message in told and "--teacher-load" in told and "\n" not in told
