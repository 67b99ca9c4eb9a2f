"""The program with a teacher, from its first step to its last, and every way to interrupt it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_salt.train import evaluate as evaluate_module
from tests.support.checkpoint_runs import rewrite
from tests.support.program import DROPOUT, Ended, entries, losses, numbers, refused, state_of, tensors, train, write_tokens

STEPS = 5
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
VP2 = dict(PP2, num_virtual_stages_per_pipeline_rank=2, num_layers=4)
OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
TEACHER_TP2 = dict(teacher_tensor_model_parallel_size=2)
TEACHER_PP2 = dict(teacher_pipeline_model_parallel_size=2)
ROUNDING = dict(rel=0, abs=3e-6)  # nats, of losses around 5: another order of the same sums
LINEAR = dict(kd_transition="linear", kd_transition_steps=2)
RATIO = dict(kd_transition="ratio", kd_transition_steps=2)
EVALUATED = dict(valid_share=0.3, eval_iters=1)
CROSSOVER = dict(EVALUATED, kd_stop="crossover", eval_interval=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A narrower model, which the program trained for some steps without a teacher."""
    save = tmp_path_factory.mktemp("teacher")
    train(
        data_path=data,
        hidden_size=16,
        ffn_hidden_size=48,
        untie_embeddings_and_output_weights=True,
        train_iters=6,
        lr=3e-2,
        save=save,
    )
    return save


def salt(data: str, teacher: Path, **flags: Any) -> dict[str, Any]:
    """Flags of a run of five steps, of which three have the teacher."""
    return dict(data_path=data, train_iters=STEPS, teacher_load=teacher, kd_steps=3) | flags


def plain(flags: dict[str, Any]) -> dict[str, Any]:
    """The same flags without those of the teacher."""
    return {name: value for name, value in flags.items() if not name.startswith(("teacher", "kd_", "stage2"))}


def taught(save: Path) -> list[tuple[Any, ...]]:
    """The figures of teacher and student for every step of stage 1."""
    names = ("step", "kd_weight", "ce", "kl", "teacher_ce", "agreement")
    return [tuple(entry[name] for name in names) for entry in entries(save) if "kd_weight" in entry]


def total_flops(save: Path) -> list[tuple[float, float]]:
    """FLOPs of student and teacher up to every step."""
    return [(entry["student_flops"], entry["teacher_flops"]) for entry in entries(save)]


def held_out(save: Path) -> list[tuple[Any, ...]]:
    """The student's figures for every evaluation."""
    return [tuple(entry[name] for name in ("step", "loss", "accuracy", "tokens")) for entry in entries(save, "eval")]


def events(save: Path, name: str) -> list[dict[str, Any]]:
    """The events of the log that have the field `name`."""
    return [entry for entry in entries(save, "event") if name in entry]


# ---- interrupted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(2, dict(TP2, **TEACHER_PP2, **LINEAR, **DROPOUT), id="tp2, teacher pp2, linear"),
        pytest.param(2, dict(VP2, **TEACHER_TP2, async_save=True, **DROPOUT), id="pp2vp2, teacher tp2, step, async"),
        pytest.param(2, dict(OVERLAP, bf16=True, stage2_micro_batch_size=1, **RATIO), id="dp2 overlap bf16, teacher tp1, ratio"),
        pytest.param(2, dict(context_parallel_size=2, **TEACHER_TP2, **LINEAR), id="cp2, teacher tp2, linear", marks=pytest.mark.full),
        pytest.param(4, dict(TP2, **PP2, **TEACHER_PP2, **OVERLAP, **LINEAR, teacher_micro_batch_size=4),
                     id="tp2pp2, teacher pp2 twice, linear", marks=pytest.mark.full),
        pytest.param(4, dict(TP2, **OVERLAP, **TEACHER_TP2, **RATIO, **DROPOUT, bf16=True), id="tp2dp2 bf16, teacher tp2, ratio",
                     marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, data: str, teacher: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """At every step around the end of stage 1: each number of the log, and the last checkpoint's weights, optimizer and random state.

    In stage 1 the teacher is needed; from its last step on the run is a plain one, and the teacher may be gone."""
    flags = salt(data, Path(shutil.copytree(teacher, tmp_path / "teacher")), **flags)
    train(world_size, **flags, save=tmp_path / "one", save_interval=1)
    one = tmp_path / "one"
    assert [entry["step"] for entry in entries(one) if "kd_weight" in entry] == [1, 2, 3]
    flops = [entry["tflops_per_rank"] / entry["tokens_per_second"] for entry in entries(one)]
    assert min(flops[:3]) == pytest.approx(max(flops[:3])) and min(flops[:3]) > 1.01 * max(flops[3:]), (
        "a teacher's arithmetic counts"
    )
    for step in (2, 3, 4):
        if step == 3:
            shutil.rmtree(tmp_path / "teacher")
            flags = plain(flags) | dict(micro_batch_size=flags.get("stage2_micro_batch_size", 2))
        two = tmp_path / f"from {step}"
        train(world_size, **flags, load=one / f"iter_{step:07d}", save=two)
        assert numbers(two) == numbers(one)[step:]
        assert taught(two) == taught(one)[step:]
        assert total_flops(two) == total_flops(one)[step:]
        assert tensors(two, STEPS) == tensors(one, STEPS)
        assert state_of(two, STEPS)["salt"] == state_of(one, STEPS)["salt"] is not None


def test_flops_that_an_earlier_release_did_not_count_are_derived_or_told_as_unknown(
    tmp_path: Path, data: str, teacher: Path
) -> None:
    """Resumed in stage 1, in stage 2 and without the teacher."""
    flags = salt(data, Path(shutil.copytree(teacher, tmp_path / "teacher")))
    one = tmp_path / "one"
    train(1, **flags, save=one, save_interval=1)
    for step, is_there in ((2, True), (4, True), (4, False)):
        old = Path(shutil.copytree(one / f"iter_{step:07d}", tmp_path / f"{step} {is_there}" / f"iter_{step:07d}"))
        extra = state_of(one, step)["extra"]
        assert extra.pop("teacher_flops") == total_flops(one)[step - 1][1]
        rewrite(old, extra=extra)
        if not is_there:
            shutil.rmtree(tmp_path / "teacher")
        ended = train(1, **(flags if step == 2 else plain(flags)), load=old, save=tmp_path / "two" / old.parent.name)
        found = total_flops(tmp_path / "two" / old.parent.name)
        assert ("teacher_flops are not told" in ended.out) == (not is_there)
        if is_there:
            assert np.array(found) == pytest.approx(np.array(total_flops(one)[step:]))
        else:
            assert found == [(student, None) for student, _ in total_flops(one)[step:]]


@pytest.mark.long
def test_leaving_after_every_step_changes_nothing(tmp_path: Path, data: str, teacher: Path) -> None:
    """Five programs of one step each, with one --save and the same flags, write one log and one curve."""
    flags = salt(data, teacher, **PP2, **TEACHER_TP2, **RATIO, **DROPOUT, stage2_micro_batch_size=4)
    train(2, **flags, save=tmp_path / "one")
    for step in range(1, STEPS + 1):
        ended = train(2, **flags, save=tmp_path / "many", load=tmp_path / "many", exit_interval=1)
        assert ("is in stage 2, since step 4: --teacher-load and the kd flags are not used" in ended.err) == (step > 3), (
            ended.err
        )
    assert numbers(tmp_path / "many") == numbers(tmp_path / "one") and taught(tmp_path / "many") == taught(tmp_path / "one")
    assert tensors(tmp_path / "many", STEPS) == tensors(tmp_path / "one", STEPS)


@pytest.mark.long
def test_the_teachers_layout_may_change(tmp_path: Path, data: str, teacher: Path) -> None:
    """It is the same teacher to rounding, at start and after a resume, also where it takes more samples at once."""
    flags = salt(data, teacher, **PP2)
    train(2, **flags, save=tmp_path / "one", save_interval=1)
    for name, other in {"tp2": TEACHER_TP2, "pp2": TEACHER_PP2, "merged": dict(teacher_micro_batch_size=4)}.items():
        train(2, **flags, **other, load=tmp_path / "one" / "iter_0000001", save=tmp_path / name)
        assert losses(tmp_path / name) == pytest.approx(
            {step: losses(tmp_path / "one")[step] for step in range(2, STEPS + 1)}, **ROUNDING
        )
        for here, there in zip(taught(tmp_path / name), taught(tmp_path / "one")[1:], strict=True):
            assert here == pytest.approx(there, rel=0, abs=3e-6)


# ---- a teacher with nothing to say, or gone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(4, dict(TP2, **PP2, **TEACHER_PP2, **OVERLAP), marks=pytest.mark.long, id="tp2pp2, teacher pp2 twice"),
        pytest.param(2, dict(OVERLAP, bf16=True), marks=pytest.mark.full, id="dp2 bf16"),
        pytest.param(2, dict(PP2, **TEACHER_TP2, bf16=True), id="pp2 bf16, teacher tp2"),
    ],
)
def test_a_teacher_of_weight_0_changes_not_a_bit(
    tmp_path: Path, data: str, teacher: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """The teacher is built, loaded, run, evaluated and freed. Weights, optimizer and random state are those of a run without it."""
    flags = salt(data, teacher, **flags, **DROPOUT, **EVALUATED, eval_interval=2, kd_weight=0.0)
    train(world_size, **flags, save=tmp_path / "with")
    train(world_size, **plain(flags), save=tmp_path / "without")
    assert numbers(tmp_path / "with") == numbers(tmp_path / "without")
    assert tensors(tmp_path / "with", STEPS) == tensors(tmp_path / "without", STEPS)
    assert held_out(tmp_path / "with") == held_out(tmp_path / "without") and len(taught(tmp_path / "with")) == 3
    assert state_of(tmp_path / "without", STEPS)["salt"] is None


@pytest.mark.parametrize("world_size, flags", [(2, dict(PP2, **TEACHER_TP2)), (2, dict(OVERLAP, micro_batch_size=1))])
def test_micro_batch_size_of_stage_2_changes_the_cut_and_no_number(
    tmp_path: Path, data: str, teacher: Path, world_size: int, flags: dict[str, Any]
) -> None:
    flags = salt(data, teacher, **flags)
    train(world_size, **flags, save=tmp_path / "same")
    ended = train(world_size, **flags, stage2_micro_batch_size=4, save=tmp_path / "other")
    same, other = numbers(tmp_path / "same"), numbers(tmp_path / "other")
    assert same[:3] == other[:3]
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "same"), **ROUNDING)
    assert [event["micro_batch_size"] for event in events(tmp_path / "other", "stage")] == [4]  # the cut did change
    (event,) = events(tmp_path / "other", "stage")
    assert event["stage"] == 2 and event["step"] == 3 and event["memory_gib_before"] > 0 and event["memory_gib_after"] > 0
    assert "step 3/5 | stage 2: the teacher" in ended.out


@pytest.mark.long
def test_a_teacher_that_stays_to_the_end(tmp_path: Path, data: str, teacher: Path) -> None:
    """--kd-steps beyond the run. What it taught may teach in its turn; a longer run still needs it."""
    train(2, **salt(data, teacher, kd_steps=100, train_iters=2, lr_decay_iters=9, **PP2), save=tmp_path / "rkd")
    assert [weight for _, weight, *_ in taught(tmp_path / "rkd")] == [0.667] * 2 and not events(tmp_path / "rkd", "stage")
    assert state_of(tmp_path / "rkd", 2)["salt"]["stage1_end"] == 100
    train(2, **salt(data, tmp_path / "rkd", train_iters=1, lr_warmup_iters=0, **TP2), save=tmp_path / "next")
    flags = salt(data, teacher, kd_steps=100, train_iters=3, lr_decay_iters=9, **PP2) | dict(
        load=tmp_path / "rkd", save=tmp_path / "rkd"
    )
    message = refused(2, **plain(flags))
    assert "step 2 is in stage 1, which ends after step 100" in message and "--teacher-load" in message
    assert "another schedule: --kd-steps is 100 there and 50 here" in refused(2, **flags | dict(kd_steps=50))
    train(2, **flags)
    assert [step for step, *_ in taught(tmp_path / "rkd")] == [1, 2, 3]


@pytest.mark.long
def test_another_schedule_takes_an_override_and_is_recorded(tmp_path: Path, data: str, teacher: Path) -> None:
    flags = salt(data, teacher)
    train(**flags, save=tmp_path / "one", save_interval=1)
    change = dict(kd_steps=4, kd_weight=0.25, load=tmp_path / "one" / "iter_0000001", save=tmp_path / "two")
    message = refused(**flags | change)
    assert "--kd-steps is 3 there and 4 here" in message and "--kd-weight is 0.667 there and 0.25 here" in message
    train(**flags | change, override_kd_schedule=True)
    assert [(step, weight) for step, weight, *_ in taught(tmp_path / "two")] == [(2, 0.25), (3, 0.25), (4, 0.25)]
    (event,) = state_of(tmp_path / "two", STEPS)["events"]
    assert event["event"] == "kd_schedule" and (event["step"], event["from"]["kd_steps"], event["to"]["kd_steps"]) == (1, 3, 4)


# ---- crossover ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def telling_whom_it_evaluates() -> Iterator[None]:
    """Make every evaluation print whether the teacher takes part in it."""

    def evaluate(*arguments: Any) -> dict[str, float]:
        print("evaluated", "the student alone" if arguments[2] is None else "student and teacher")
        return original(*arguments)

    original = evaluate_module.evaluate
    with mock.patch.object(evaluate_module, "evaluate", evaluate):
        yield


def with_its_teacher(ended: Ended) -> list[bool]:
    """For every evaluation, whether the teacher took part."""
    return [line.endswith("teacher") for line in ended.out.splitlines() if line.startswith("evaluated")]


@pytest.mark.long
@pytest.mark.parametrize(
    "world_size, flags", [pytest.param(2, OVERLAP, marks=pytest.mark.full), (2, dict(PP2, **TEACHER_TP2, **DROPOUT))]
)
def test_a_crossover_ends_stage_1_after_the_transition_and_is_a_fact(
    tmp_path: Path, data: str, teacher: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """A margin that any student keeps: the first evaluation, at step 1, decides. Resumed anywhere, the run takes the same path."""
    flags = salt(data, teacher, **flags, **CROSSOVER, **LINEAR, kd_steps=4, kd_stop_margin=-1.0, no_eval_at_start=True)
    ended = train(world_size, **flags, save=tmp_path / "one", save_interval=1, within=telling_whom_it_evaluates)
    one = tmp_path / "one"
    assert with_its_teacher(ended) == [True, False, False, False, False]
    assert [step for step, *_ in taught(one)] == [1, 2, 3]
    assert [weight for _, weight, *_ in taught(one)] == pytest.approx([0.667, 0.667 * 2 / 3, 0.667 / 3])
    (event,) = events(one, "crossover")
    assert (event["step"], event["crossover"], event["stage1_end"]) == (1, 1, 3)
    before, fact = state_of(one, 1)["salt"], state_of(one, 2)["salt"]
    assert (before["crossover"], state_of(one, 1)["extra"]["evaluation_due"]) == (None, True)  # saved before it was decided
    assert (fact["crossover"], fact["stage1_end"]) == (1, 3) and all(state_of(one, step)["salt"] == fact for step in (3, 4, 5))
    figures = [(entry["teacher_loss"], entry["teacher_accuracy"]) for entry in entries(one, "eval")[:3]]
    assert figures == [(fact["teacher_held_out"]["loss"], fact["teacher_held_out"]["accuracy"])] * 3
    train(world_size, **flags, load=one / "iter_0000002", save=tmp_path / "told", within=telling_whom_it_evaluates)
    assert held_out(tmp_path / "told") == held_out(one)[2:]  # the checkpoint knows that its evaluation was made
    for step in range(1, STEPS):
        two = tmp_path / f"from {step}"
        (one / f"iter_{step:07d}" / "evaluated.json").unlink()  # as of a run that was killed between save and evaluation
        ended = train(world_size, **flags, load=one / f"iter_{step:07d}", save=two, within=telling_whom_it_evaluates)
        assert with_its_teacher(ended) == [step <= 3, *[False] * (STEPS - step)]  # the held-out data may have changed
        assert held_out(two) == held_out(one)[step - 1 :]
        assert (
            numbers(two) == numbers(one)[step:]
            and taught(two) == taught(one)[step:]
            and bool(events(two, "crossover")) == (step == 1)
        )
        assert tensors(two, STEPS) == tensors(one, STEPS) and state_of(two, STEPS)["salt"] == fact


def test_a_crossover_never_lengthens_stage_1_and_one_out_of_reach_never_comes(tmp_path: Path, data: str, teacher: Path) -> None:
    """min(kd_steps, t + transition), here with t the second evaluation of two steps each. The one before the first step decides nothing."""
    flags = salt(data, teacher, **CROSSOVER | dict(eval_interval=2))
    train(**flags, kd_stop_margin=1.0, save=tmp_path / "never")
    assert len(taught(tmp_path / "never")) == 3 and not events(tmp_path / "never", "crossover")
    fact = state_of(tmp_path / "never", STEPS)["salt"]
    assert (fact["crossover"], fact["stage1_end"]) == (None, 3)
    train(**flags, kd_stop_margin=-1.0, save=tmp_path / "at once")
    assert len(taught(tmp_path / "at once")) == 2
    flags |= dict(LINEAR, kd_steps=5, kd_transition_steps=2, train_iters=6)
    with_late = dict(flags, kd_stop_margin=-1.0, within=not_before_the_second_evaluation)
    train(**with_late, save=tmp_path / "late")
    fact = state_of(tmp_path / "late", 6)["salt"]
    assert (fact["crossover"], fact["stage1_end"]) == (4, 5) and len(taught(tmp_path / "late")) == 5


@contextlib.contextmanager
def not_before_the_second_evaluation() -> Iterator[None]:
    """Make the student's accuracy at the first evaluation after a step lower than any teacher's."""
    count = 0

    def evaluate(*arguments: Any) -> dict[str, float]:
        nonlocal count
        count += 1
        figures = original(*arguments)
        return figures if count > 2 else figures | {"accuracy": -5.0}

    original = evaluate_module.evaluate
    with mock.patch.object(evaluate_module, "evaluate", evaluate):
        yield
