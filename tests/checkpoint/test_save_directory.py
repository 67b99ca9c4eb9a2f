from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_salt.checkpoint import save_directory
from megatron_salt.checkpoint.save_directory import STATE, TRACKER
from megatron_salt.errors import UserError
from megatron_salt.salt.teacher_checkpoint import read_teacher
from megatron_salt.tools.generate_text import newest_checkpoint


def put(root: Path, step: int, content: str = "new") -> Path:
    """Write a complete save under its .partial name, as it is just before `publish`."""
    directory = save_directory.partial_of(root, step)
    directory.mkdir(parents=True)
    (directory / STATE).write_text(json.dumps({"content": content}))
    (directory / "shard").write_text("bytes")
    return directory


def contents(path: Path) -> str:
    """The content of a checkpoint. Fails where the checkpoint is not whole."""
    assert (path / "shard").read_text() == "bytes"
    return json.loads((path / STATE).read_text())["content"]


class _Crash(BaseException):
    pass


def _crash_after(monkeypatch: pytest.MonkeyPatch, operations: int) -> None:
    """Raise an error at the file operation after `operations` renames, removals and syncs."""
    left = operations

    def counted(action: Callable) -> Callable:
        def act(*arguments: object, **named: object) -> object:
            nonlocal left
            if left == 0:
                raise _Crash
            left -= 1
            return action(*arguments, **named)

        return act

    for owner, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("step, old_step", [(20, 10), (20, 20)])
def test_a_crash_between_any_two_operations_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, step: int, old_step: int
) -> None:
    finished = False
    for operations in range(40):
        root = tmp_path / str(operations)
        put(root, old_step, "old")
        save_directory.publish(root, old_step)
        put(root, step)
        with pytest.MonkeyPatch.context() as patch:
            _crash_after(patch, operations)
            try:
                save_directory.publish(root, step)
                finished = True
            except _Crash:
                pass
        first = save_directory.candidates(root)[0]
        assert contents(first) in ("old", "new")
        save_directory.tidy(root)
        assert contents(save_directory.candidates(root)[0]) in ("old", "new")
        assert {path.name for path in root.iterdir()} <= {TRACKER, "iter_0000010", "iter_0000020"}
        if finished:
            assert contents(first) == "new" and first.name == "iter_0000020"
            break
    assert finished


def test_a_crash_between_any_two_operations_of_a_deletion_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    for operations in range(10):
        root = tmp_path / str(operations)
        for step in (10, 20):
            put(root, step, str(step))
            save_directory.publish(root, step)
        with pytest.MonkeyPatch.context() as patch:
            _crash_after(patch, operations)
            with contextlib.suppress(_Crash):
                save_directory.delete(root / "iter_0000010")
        assert [contents(path) for path in save_directory.whole_checkpoints(root).values()] in (["10", "20"], ["20"])
        save_directory.tidy(root)
        assert {path.name for path in root.iterdir()} <= {TRACKER, "iter_0000010", "iter_0000020"}


def test_candidates_are_the_latest_and_those_before_it(tmp_path: Path) -> None:
    for step in (10, 30, 20):  # rewound to 10, and saved at 20 last
        put(tmp_path, step)
        save_directory.publish(tmp_path, step)
    put(tmp_path, 40)
    assert [path.name for path in save_directory.candidates(tmp_path)] == ["iter_0000020", "iter_0000010"]
    assert [path.name for path in save_directory.candidates(tmp_path / "iter_0000030")] == [
        "iter_0000030",
        "iter_0000020",
        "iter_0000010",
    ]
    (tmp_path / TRACKER).unlink()
    assert save_directory.candidates(tmp_path)[0].name == "iter_0000030"
    with pytest.raises(UserError, match="never finished"):
        save_directory.candidates(save_directory.partial_of(tmp_path, 40))
    assert save_directory.candidates(tmp_path / "nowhere") == []


def test_a_tracker_that_names_nothing_is_refused_unless_falling_back(tmp_path: Path) -> None:
    for step in (10, 20):
        put(tmp_path, step)
        save_directory.publish(tmp_path, step)
    for content, complaint in ((b"30\n", "iter_0000030"), (b"2\xff0", "number of a step"), (b"", "number of a step")):
        (tmp_path / TRACKER).write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            save_directory.candidates(tmp_path)
        assert save_directory.candidates(tmp_path, fallback=True)[0].name == "iter_0000020"


def saves(root: Path, *steps: int) -> None:
    for step in steps:
        put(root, step)
        save_directory.publish(root, step)


def test_a_checkpoint_that_is_a_link_is_unlinked_and_its_target_stays(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    saves(root, 10, 20, 30)
    (root / "iter_0000010").rename(elsewhere)
    (root / "iter_0000010").symlink_to(elsewhere)
    assert save_directory.make_room(root, [10, 20]) == []
    assert {path.name for path in root.iterdir()} == {TRACKER, "iter_0000030"}
    assert contents(elsewhere) == "new"


def test_a_step_whose_name_a_broken_link_has_is_saved_all_the_same(tmp_path: Path) -> None:
    saves(tmp_path, 10)
    (tmp_path / "iter_0000020").symlink_to(tmp_path / "nowhere")
    saves(tmp_path, 20)
    assert contents(tmp_path / "iter_0000020") == "new"
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "iter_0000010", "iter_0000020"}


@pytest.mark.parametrize("suffix", ["partial", "replaced", "deleting"])
def test_leftovers_that_are_links_or_files_are_removed_at_the_start(tmp_path: Path, suffix: str) -> None:
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    saves(root, 10)
    elsewhere.mkdir()
    (root / f"iter_0000010.{suffix}").symlink_to(elsewhere)
    (root / f"iter_0000020.{suffix}").write_text("no directory")
    (root / f"iter_0000030.{suffix}").symlink_to(tmp_path / "nowhere")
    assert len(save_directory.tidy(root)) == 3
    assert {path.name for path in root.iterdir()} == {TRACKER, "iter_0000010"} and elsewhere.is_dir()


def test_a_deletion_that_fails_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves(tmp_path, 10, 20)
    with monkeypatch.context() as patch:

        def busy(path: Path) -> None:
            raise OSError(16, "Device or resource busy", str(path))

        patch.setattr(shutil, "rmtree", busy)
        (line,) = save_directory.make_room(tmp_path, [10])
        assert "iter_0000010" in line and "busy" in line
        (line,) = save_directory.tidy(tmp_path)
        assert "cannot be deleted" in line
        (line,) = save_directory.make_room(tmp_path, [])
        assert "iter_0000010.deleting" in line
    assert save_directory.make_room(tmp_path, []) == []
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "iter_0000020"}


def test_an_open_model_in_place_of_a_checkpoint_is_told_how_it_comes_in(tmp_path: Path) -> None:
    model, file = tmp_path / "SmolLM2", tmp_path / "small.gguf"
    model.mkdir()
    for load in (model, file):
        assert save_directory.how_to_import(load) == ""
    (model / "config.json").write_text("{}")
    file.write_bytes(b"GGUF")
    for load, source in ((model, model), (file, f"--from gguf {file}")):
        with pytest.raises(UserError, match=f"holds no checkpoint; salt-convert import {source} --to OUT makes one"):
            read_teacher(str(load))
        with pytest.raises(UserError, match=f"holds no checkpoint; salt-convert import {source} --to OUT makes one"):
            newest_checkpoint(load)
