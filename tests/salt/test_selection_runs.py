"""The program with a selection in stage 1, with and without a teacher: which samples it draws, and every way to interrupt it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_salt.data.batch import Batches
from megatron_salt.metrics.history import read_curve
from megatron_salt.model.flops import flops_per_token, forward_flops_per_token
from megatron_salt.salt.teacher_checkpoint import read_teacher
from tests.salt.test_salt_runs import OVERLAP, PP2, RATIO, STEPS, TEACHER_TP2, TP2, events, taught
from tests.support.program import (
    DROPOUT,
    GLOBAL_BATCH,
    NUM_WINDOWS,
    SEQ_LENGTH,
    entries,
    losses,
    numbers,
    refused,
    state_of,
    tensors,
    train,
    write_tokens,
)  # fmt: skip
from tests.support.selections import write_ids

MORE_WINDOWS = 14
ALL = list(range(NUM_WINDOWS + MORE_WINDOWS))
CHOSEN = [*range(0, 22, 2), *range(22, 36, 3)]  # 11 and 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return write_tokens(folder / "words"), write_tokens(folder / "more", windows=MORE_WINDOWS, seed=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, str]) -> Path:
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


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, str]) -> str:
    return write_ids(tmp_path_factory.mktemp("chosen") / "chosen", data, SEQ_LENGTH, CHOSEN)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, str]) -> str:
    return write_ids(tmp_path_factory.mktemp("all") / "all", data, SEQ_LENGTH, ALL)


def selected(data: tuple[str, str], chosen: str, **flags: Any) -> dict[str, Any]:
    """Flags of a run of five steps, of which three draw from the selection, without a teacher."""
    return dict(data_path=data, train_iters=STEPS, stage1_selection=chosen, kd_steps=3, kd_weight=0.0) | flags


@contextlib.contextmanager
def telling_samples() -> Iterator[None]:
    """Make the program print the samples of each step."""
    whole = Batches.fetch

    def fetch(batches: Batches, consumed: int) -> Any:
        microbatches = whole(batches, consumed)
        if batches.samples.split == "train":
            print(f"fetched {consumed}:", *(number for one in microbatches for number in one.sample_ids))
        return microbatches

    with mock.patch.object(Batches, "fetch", fetch):
        yield


def fetched(out: str) -> dict[int, list[int]]:
    """{consumed count: samples}."""
    lines = [line.split() for line in out.splitlines() if line.startswith("fetched")]
    return {int(words[1].rstrip(":")): list(map(int, words[2:])) for words in lines}


# ---- what is drawn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.667, 0.0])
def test_selecting_everything_is_no_selection_bit_for_bit(
    tmp_path: Path, data: tuple[str, str], teacher: Path, everything: str, weight: float
) -> None:
    """With a teacher; and without one, at weight 0, which is a plain run."""
    flags: dict[str, Any] = dict(data_path=data, train_iters=STEPS, **PP2, **DROPOUT)
    taught_by: dict[str, Any] = dict(teacher_load=teacher, kd_steps=STEPS, kd_weight=weight) if weight else {}
    train(2, **flags, **taught_by, save=tmp_path / "without")
    train(2, **flags, **dict(taught_by, kd_steps=STEPS, kd_weight=weight), stage1_selection=everything, save=tmp_path / "with")
    assert numbers(tmp_path / "with") == numbers(tmp_path / "without")
    assert tensors(tmp_path / "with", STEPS) == tensors(tmp_path / "without", STEPS)
    assert weight == 0.0 or taught(tmp_path / "with") == taught(tmp_path / "without")


@pytest.mark.parametrize("stage2", ["all", "unseen"])
def test_stage_1_draws_the_selection_and_stage_2_what_it_is_told(
    tmp_path: Path, data: tuple[str, str], teacher: Path, chosen: str, stage2: str
) -> None:
    """Two steps of 8 visit each of the 16 chosen samples once. The third repeats some, and the log says so."""
    ended = train(**selected(data, chosen, teacher_load=teacher, kd_weight=0.5, stage2_data=stage2, train_iters=6),
                  save=tmp_path / "run", within=telling_samples)  # fmt: skip
    steps = fetched(ended.out)
    assert list(steps) == [GLOBAL_BATCH * step for step in range(6)]
    assert sorted(steps[0] + steps[8]) == CHOSEN and set(steps[16]) < set(CHOSEN)
    later = steps[24] + steps[32] + steps[40]
    repeats = [event["message"] for event in entries(tmp_path / "run", "event")]
    assert any("24 samples take 24 from the train data, which has 16: 8 are repeats" in told for told in repeats), repeats
    (switch,) = events(tmp_path / "run", "stage2_since")
    assert switch["step"] == 3 and switch["stage2_since"] == 24 and f"--stage2-data {stage2}" in switch["message"]
    if stage2 == "all":
        assert len(set(later)) == 24  # an epoch of its own
        again = len(set(later) & set(CHOSEN))
        assert again and f"{again} of the 24 samples of stage 2 were in stage 1 too" in switch["message"]
    else:
        assert set(later[:20]) == set(ALL) - set(CHOSEN) and "were in stage 1 too" not in switch["message"]
    assert state_of(tmp_path / "run", 6)["data"] == {"position": 48, "stage2_since": 24}
    assert "kd_weight" in entries(tmp_path / "run")[2] and "kd_weight" not in entries(tmp_path / "run")[3]


def test_after_a_crossover_what_the_selection_had_left_is_unseen(
    tmp_path: Path, data: tuple[str, str], teacher: Path, chosen: str
) -> None:
    """The first evaluation, after step 1, ends stage 1: the eight chosen samples whose turn did not come are drawn later."""
    flags = selected(data, chosen, teacher_load=teacher, kd_weight=0.5, kd_stop="crossover", kd_stop_margin=-1.0, eval_interval=1,
                     eval_iters=1, valid_data_path=data[:1], allow_valid_in_train=True, stage2_data="unseen")  # fmt: skip
    steps = fetched(train(**flags, save=tmp_path / "run", within=telling_samples).out)
    assert set(steps[0]) < set(CHOSEN)
    later = [number for consumed in (8, 16, 24) for number in steps[consumed]]
    assert len(set(later)) == 24 and not set(later) & set(steps[0]) and set(later) & set(CHOSEN)


def test_the_log_tells_what_share_of_the_compute_the_scores_took(tmp_path: Path, data: tuple[str, str], teacher: Path) -> None:
    """Where the teacher that scored is the run's own, which teaches in three of five steps."""
    facts = read_teacher(str(teacher))
    chosen = write_ids(tmp_path / "chosen", data, SEQ_LENGTH, CHOSEN, teacher=facts.fingerprint)
    train(**selected(data, chosen, teacher_load=teacher, kd_weight=0.5), save=tmp_path / "run")
    [event] = events(tmp_path / "run", "scoring_flops")
    padded = facts.model.padded_vocabulary_size(facts.vocabulary_size)
    student = replace(facts.model, hidden_size=32, ffn_hidden_size=64)
    taught = 3 * GLOBAL_BATCH * SEQ_LENGTH * forward_flops_per_token(facts.model, SEQ_LENGTH, padded)
    learned = STEPS * GLOBAL_BATCH * SEQ_LENGTH * flops_per_token(student, SEQ_LENGTH, padded)
    assert event["scoring_flops"] == pytest.approx(taught / (3 * GLOBAL_BATCH) * len(ALL))
    assert event["training_flops"] == pytest.approx(taught + learned)
    last = entries(tmp_path / "run")[-1]
    assert (last["student_flops"], last["teacher_flops"]) == pytest.approx((learned, taught))
    share = event["scoring_flops"] / event["training_flops"]
    assert f"{share:.1%} of the {event['training_flops']:.3g} that this run takes" in event["message"]


# ---- interrupted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(1, dict(stage2_data="all", skip_samples=("10:13", "30:34")), id="alone, all, skips"),
        pytest.param(2, dict(TP2, **DROPOUT, mix=True, stage2_data="unseen"), id="tp2, weights, unseen"),
        pytest.param(2, dict(OVERLAP, bf16=True, stage2_micro_batch_size=1, stage2_data="unseen", teach=True, **RATIO),
                     id="dp2 overlap bf16, teacher, unseen"),
        pytest.param(2, dict(PP2, **TEACHER_TP2, teach=True, stage2_data="all"), id="pp2, teacher tp2, all", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, data: tuple[str, str], teacher: Path, chosen: str, world_size: int, flags: dict[str, Any]
) -> None:
    """At every step around the end of stage 1. The flags stay as they are."""
    asked = dict(flags)
    teach = dict(teacher_load=teacher, kd_weight=0.5) if asked.pop("teach", False) else {}
    paths = ("0.6", data[0], "0.4", data[1]) if asked.pop("mix", False) else data
    run = selected(data, chosen, **teach) | dict(asked, data_path=paths)
    train(world_size, **run, save=tmp_path / "one", save_interval=1)
    one = tmp_path / "one"
    for step in (2, 3, 4):
        two = tmp_path / f"from {step}"
        train(world_size, **run, load=one / f"iter_{step:07d}", save=two)
        assert numbers(two) == numbers(one)[step:]
        assert tensors(two, STEPS) == tensors(one, STEPS)
        for fact in ("data", "salt"):
            assert state_of(two, STEPS)[fact] == state_of(one, STEPS)[fact] is not None


def test_the_curve_depends_on_the_selection_and_on_stage_2s_data(tmp_path: Path, data: tuple[str, str], chosen: str) -> None:
    for name, flags in (("all", {}), ("unseen", dict(stage2_data="unseen")), ("plain", None)):
        train(
            **(dict(data_path=data, train_iters=STEPS) if flags is None else selected(data, chosen, **flags)),
            save=tmp_path / name,
        )
    curve = read_curve("all", tmp_path / "all" / "train.jsonl")
    assert curve.switch is not None and (curve.switch.step, curve.switch.gib_before) == (3, None)
    curves = {name: list(losses(tmp_path / name).values()) for name in ("all", "unseen", "plain")}
    assert curves["all"][:3] == curves["unseen"][:3] != curves["plain"][:3]
    assert curves["all"][3:] != curves["unseen"][3:]


# ---- refused ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_selection_alone(tmp_path: Path, data: tuple[str, str], chosen: str, everything: str) -> None:
    flags = selected(data, chosen, train_iters=2, lr_decay_iters=9)
    train(**flags, save=tmp_path / "run")
    on = dict(load=tmp_path / "run", save=tmp_path / "run", train_iters=4)
    for changes in (dict(stage1_selection=everything), dict(stage2_data="unseen")):
        message = refused(**flags | on | changes)
        assert "stage 1 from selection:" in message and "--new-data goes on with it" in message
    message = refused(**flags | on | dict(stage1_selection=None, kd_steps=None, kd_weight=None))
    assert "--new-data goes on with it" in message
    train(**flags | on)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(seq_length=8), "was chosen from other samples than this run has: --seq-length is 16 there and 8 here"),
        (dict(swap=True), "was chosen from other samples than this run has"),
        (dict(global_batch_size=32), "has 16 samples, fewer than one --global-batch-size 32"),
        (dict(valid_share=0.1, eval_iters=1), "that --valid-share holds out: select again with the same --valid-share"),
        (dict(stage1_selection="nowhere.npy"), "nowhere.json does not exist"),
        (dict(kd_weight=0.5), "--kd-steps 3 needs a teacher: give --teacher-load (or --stage1-selection with --kd-weight 0)"),
        (dict(kd_steps=None), "needs --kd-steps, the length of stage 1"),
        (dict(stage1_selection=None, kd_steps=None, stage2_data="unseen"), "--stage2-data unseen needs --stage1-selection"),
        (dict(kd_stop="crossover"), "--kd-stop crossover asks when the student passes its teacher: it needs --teacher-load"),
        (dict(stage2_data="some"), "--stage2-data"),
    ],
)
def test_mistakes_are_refused_by_name(
    tmp_path: Path, data: tuple[str, str], chosen: str, changes: dict[str, Any], told: str
) -> None:
    changes = dict(changes)
    paths = data[::-1] if changes.pop("swap", False) else data
    assert told in refused(**selected(data, chosen) | dict(data_path=paths, save=tmp_path / "run") | changes)
    assert not (tmp_path / "run").exists()


def test_a_truncated_selection_is_refused(tmp_path: Path, data: tuple[str, str]) -> None:
    path = Path(write_ids(tmp_path / "short", data, SEQ_LENGTH, CHOSEN))
    path.write_bytes(path.read_bytes()[:-4])
    assert "short.npy is truncated" in refused(**selected(data, str(path)))
    np.save(path, np.array(CHOSEN[::-1], np.uint32))
    assert "is not the file that" in refused(**selected(data, str(path)))
