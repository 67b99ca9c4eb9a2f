"""--eval-tasks: what a run logs of its tasks, that training does not see them, and that a resumed run neither repeats nor loses one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.config import ParallelConfig, TrainingConfig
from megatron_salt.evaluation import in_training
from megatron_salt.evaluation.evaluate_task import evaluate_task
from megatron_salt.evaluation.task_file import read_shots, read_tasks
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.tools.evaluated.candidate import load_model, open_candidate
from megatron_salt.tools.flags.evaluate_config import EvaluateConfig
from megatron_salt.train import loop
from tests.support.program import DROPOUT, entries, numbers, refused, tensors, train, write_tokens
from tests.support.ranks import run_ranks

STEPS = 4
LETTERS = [{"context": f"{number}:", "choices": ["ab", "cde"], "gold": number % 2} for number in range(5)]
WORDS = [{"passage": "one two three"}, {"passage": "a passage that is longer than the context of this model"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and two task files."""
    home = tmp_path_factory.mktemp("data")
    write_tokens(home / "words")
    for name, records in (("letters", LETTERS), ("last", WORDS)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return home


def flags(home: Path, **more: Any) -> dict[str, Any]:
    tasks = [home / "letters.jsonl", home / "last.jsonl"]
    return dict(data_path=home / "words", train_iters=STEPS, eval_tasks=tasks, eval_tasks_interval=2, **DROPOUT) | more


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """A run with two tasks."""
    save = tmp_path_factory.mktemp("evaluated")
    printed = train(**flags(home), save=save, tensorboard_dir=save / "curves").out
    assert "step 2/4 | task letters | acc 0." in printed and "% of the time" in printed
    assert "| 2 examples, 1 contexts cut in " in printed
    return save


def figures(save: Path) -> list[dict[str, Any]]:
    """The entries of tasks without times."""
    return [
        {key: value for key, value in entry.items() if key not in ("time", "seconds", "share_of_time")}
        for entry in entries(save, "task")
    ]


def by_the_tool(save: str, files: list[str], shots: int = 0) -> dict[str, dict[str, Any]]:
    """In one rank: the figures of the saved checkpoint by evaluate.py. shots: of the files themselves."""
    config = EvaluateConfig(load=(save,), tasks=tuple(files), output="unused", shots=shots)
    solved = read_shots(shots, files, len(files))
    candidate = open_candidate(save, config, ParallelConfig(), read_tasks(files), solved)
    mesh = make_student_mesh(student_layout(ParallelConfig(), 1))
    chunks = load_model(candidate, ParallelConfig(), mesh)
    return {
        asked.task.name: evaluate_task(asked, chunks, mesh, batch_tokens=999, seed=1234)["metrics"]
        for asked, _ in candidate.work
    }


def test_each_task_has_an_entry_at_the_start_at_its_interval_and_at_the_end(evaluated: Path) -> None:
    assert [(entry["step"], entry["name"]) for entry in figures(evaluated)] == [
        (step, name) for step in (0, 2, 4) for name in ("letters", "last")
    ]
    assert all(entry["seconds"] > 0 and 0 < entry["share_of_time"] <= 1 for entry in entries(evaluated, "task"))
    assert [entry["cut"] for entry in figures(evaluated)] == [0, 1] * 3
    events = EventAccumulator(str(evaluated / "curves"))
    events.Reload()
    assert {"task-letters/acc_norm", "task-last/logprob_per_byte"} <= set(events.Tags()["scalars"])


def test_they_are_what_the_tool_finds_in_the_checkpoint(evaluated: Path, home: Path) -> None:
    [found] = run_ranks(1, by_the_tool, str(evaluated), [str(home / "letters.jsonl"), str(home / "last.jsonl")])
    for entry in figures(evaluated)[-2:]:
        for name, figure in found[entry["name"]].items():
            assert entry[name] == pytest.approx(figure["value"], rel=1e-5)
            assert entry[f"{name}_stderr"] == pytest.approx(figure["stderr"], rel=1e-4)


def test_shots_are_those_of_the_tool(tmp_path: Path, home: Path) -> None:
    letters = [home / "letters.jsonl"]
    shots = dict(eval_tasks=letters, eval_tasks_shots=1, eval_tasks_shot_file=letters, no_eval_at_start=True)
    train(**flags(home, **shots), save=tmp_path)
    [at_2, at_4] = figures(tmp_path)
    [found] = run_ranks(1, by_the_tool, str(tmp_path), [str(letters[0])], 1)
    assert (at_2["step"], at_4["step"], at_4["cut"]) == (2, 4, 0)
    for name, figure in found["letters"].items():
        assert at_4[name] == pytest.approx(figure["value"], rel=1e-5)
    [without] = run_ranks(1, by_the_tool, str(tmp_path), [str(letters[0])])
    assert without["letters"]["logprob_per_byte"]["value"] != pytest.approx(at_4["logprob_per_byte"], rel=1e-3)


@pytest.mark.parametrize(
    "layout, world_size",
    [
        pytest.param(
            dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True), 2, marks=pytest.mark.long
        ),
        pytest.param(dict(pipeline_model_parallel_size=2), 2, marks=pytest.mark.full),
        ({}, 1),
    ],
)
def test_training_is_the_same_bit_for_bit(tmp_path: Path, home: Path, layout: dict[str, Any], world_size: int) -> None:
    train(world_size, **flags(home, **layout), save=tmp_path / "with")
    train(world_size, **flags(home, **layout, eval_tasks=None, eval_tasks_interval=None), save=tmp_path / "without")
    assert numbers(tmp_path / "with") == numbers(tmp_path / "without")
    assert tensors(tmp_path / "with", STEPS) == tensors(tmp_path / "without", STEPS)
    assert len(figures(tmp_path / "with")) == 6 and not figures(tmp_path / "without")


@contextlib.contextmanager
def stopping(stop: Path, number: int) -> Iterator[None]:
    """Makes the exit file before task `number`, from 1, of the run."""
    count = 0

    def stopped(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            stop.touch()
        return evaluate_task(*arguments, **options)

    with mock.patch.object(in_training, "evaluate_task", stopped):
        yield


def test_an_interrupted_evaluation_comes_again_whole(tmp_path: Path, home: Path, evaluated: Path) -> None:
    """The run leaves in its second task after step 2: it logs neither, saves, and evaluates both when it is started again."""
    stop, save = tmp_path / "stop", tmp_path / "run"
    train(**flags(home), save=save, exit_file=stop, within=partial(stopping, stop, 3))
    [cut] = [entry["message"] for entry in entries(save, "event") if "cut short" in entry["message"]]
    assert cut.startswith("evaluation of 2 tasks cut short: ")
    assert [entry["step"] for entry in figures(save)] == [0, 0]
    stop.unlink()
    shutil.copytree(save, other := tmp_path / "other flags")
    train(**flags(home), save=save, load=save)
    assert figures(save) == figures(evaluated)
    assert numbers(save) == numbers(evaluated)
    train(**flags(home, eval_tasks_interval=3), save=other, load=other)
    assert [entry["step"] for entry in figures(other)] == [0, 0, 2, 2, 3, 3, 4, 4]  # as due then, and as due now
    assert figures(other)[:4] == figures(evaluated)[:4]


SETS: Any = ("sets",)
TASKS: Any = ("tasks",)


@pytest.mark.parametrize(
    "due, step, evaluated_now",
    [
        (("held_out",), 6, (SETS, TASKS)),
        (("tasks",), 4, (SETS, TASKS)),
        (("tasks",), 5, ((), TASKS)),
        (("held_out", "tasks"), 5, (SETS, TASKS)),
        (("held_out",), 5, (SETS, ())),
        ((), 0, (SETS, TASKS)),
    ],
)
def test_a_start_evaluates_what_was_due_under_the_flags_of_then_or_of_now(due: Any, step: int, evaluated_now: Any) -> None:
    training = TrainingConfig(eval_interval=2, eval_tasks=("a.jsonl",), eval_tasks_interval=3)
    run: Any = SimpleNamespace(valid=SETS, tasks=TASKS, plan=SimpleNamespace(total_steps=100))
    assert loop._due_at_start(run, training, RunState(step=step, evaluation_due=True, due=due)) == evaluated_now
    assert loop._due_at_start(run, training, RunState(step=step)) == ((), ())


def test_bad_tasks_are_refused_before_the_start(tmp_path: Path, home: Path) -> None:
    assert refused(**flags(home, eval_tasks=None)) == "--eval-tasks-interval 2 needs --eval-tasks: the task files"
    alone = dict(eval_tasks=None, eval_tasks_interval=None)
    assert refused(**flags(home, **alone, eval_tasks_shots=2)) == "--eval-tasks-shots 2 needs --eval-tasks: the task files"
    message = "--eval-tasks-shots 2 needs a --eval-tasks-shot-file for each of 2 --eval-tasks, got 1"
    letters = [home / "letters.jsonl"]
    assert refused(**flags(home, eval_tasks_shots=2, eval_tasks_shot_file=letters)) == message
    assert refused(**flags(home, eval_tasks_shot_file=letters)).startswith(
        "--eval-tasks-shot-file needs --eval-tasks-shots: how many"
    )
    few = refused(**flags(home, eval_tasks=letters, eval_tasks_shots=5, eval_tasks_shot_file=letters))
    assert few.startswith(f"--eval-tasks-shots 5: --eval-tasks-shot-file {letters[0]} has 4 examples other than line 1 of"), few
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "x", "choices": ["a", "b"], "gold": 2}')
    assert refused(**flags(home, eval_tasks=[bad])).startswith(f"--eval-tasks {bad}, line 1: 'gold' is 2, which is no index")
    bad.write_text('{"context": "x", "continuation": " is much longer than sixteen"}')
    assert refused(**flags(home, eval_tasks=[bad])).startswith(f"--eval-tasks {bad}, line 1: the continuation has 28 tokens")
