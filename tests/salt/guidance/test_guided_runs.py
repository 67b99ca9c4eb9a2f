"""The program with a teacher that guides a layer: until when, what it costs, interrupted, and from a cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_salt import pretrain
from megatron_salt.model.flops import body_flops, head_flops
from megatron_salt.salt.teacher_checkpoint import read_teacher
from tests.salt.test_salt_runs import PP2, TEACHER_TP2, events, plain, total_flops
from tests.support.program import (
    DROPOUT,
    GLOBAL_BATCH,
    SEQ_LENGTH,
    argv,
    entries,
    numbers,
    refused,
    state_of,
    tensors,
    train,
    write_tokens,
)

STEPS, KD_STEPS, LET_STEPS = 5, 2, 4
ROWS = 384  # of the byte-level tokenizer's 257 ids
BOTH: dict[str, Any] = dict(guide="both", kd_steps=KD_STEPS, let_steps=LET_STEPS, let_layer=1, let_weight=0.5)
HIDDEN: dict[str, Any] = dict(guide="hidden", let_steps=KD_STEPS, let_layer=1, let_weight=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    save = tmp_path_factory.mktemp("teacher")
    train(
        data_path=data, hidden_size=16, ffn_hidden_size=48, untie_embeddings_and_output_weights=True, train_iters=2, save=save
    )
    return save


def guided(data: str, teacher: Path, **flags: Any) -> dict[str, Any]:
    return dict(data_path=data, train_iters=STEPS, teacher_load=teacher) | flags


def weights(save: Path) -> list[tuple[float | None, float | None]]:
    """(w, lambda) of every step."""
    return [(entry.get("kd_weight"), entry.get("let_weight")) for entry in entries(save)]


def distances(save: Path) -> list[float | None]:
    """Mean 1 - cosine of every step."""
    return [entry.get("let_loss") for entry in entries(save)]


def teacher_flops(save: Path) -> list[float]:
    """FLOPs of the teacher in every step."""
    totals = [teacher for _, teacher in total_flops(save)]
    return [after - before for before, after in zip([0.0, *totals], totals, strict=False)]


@pytest.mark.parametrize(
    "world_size, flags, points",
    [
        pytest.param(1, DROPOUT, (1, 3), marks=pytest.mark.full, id="one rank"),
        pytest.param(2, dict(PP2, **TEACHER_TP2, **DROPOUT), (2, 4), id="pp2, teacher tp2"),
    ],
)  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, data: str, teacher: Path, world_size: int, flags: dict[str, Any], points: tuple[int, ...]
) -> None:
    """Soft labels end before guidance, the teacher stays for both, and what it computes is what the log counts. From its last step on a
    resumed run needs no teacher."""
    flags = guided(data, Path(shutil.copytree(teacher, tmp_path / "teacher")), **BOTH, **flags)
    model, one = read_teacher(str(teacher)).model, tmp_path / "one"
    ended = train(world_size, **flags, save=one, save_interval=1)
    assert weights(one) == [(0.667, 0.5), (0.667, 0.375), (None, 0.25), (None, 0.125), (None, None)]
    told = distances(one)
    assert all(far is not None and 0 < far < 2 for far in told[:LET_STEPS]) and told[LET_STEPS:] == [None]
    assert told[0] is not None and told[LET_STEPS - 1] is not None and told[LET_STEPS - 1] < told[0]
    tokens, body, head = GLOBAL_BATCH * SEQ_LENGTH, body_flops(model, SEQ_LENGTH), head_flops(model, ROWS)
    expected = [tokens * (body + head)] * KD_STEPS + [tokens * body] * (LET_STEPS - KD_STEPS) + [0.0]
    assert teacher_flops(one) == expected
    assert [event["step"] for event in events(one, "stage")] == [
        LET_STEPS
    ] and "stage 1: the teacher is freed after step 4" in ended.err
    assert [("kl" in entry, "ce" in entry) for entry in entries(one)] == [(True, True)] * KD_STEPS + [(False, False)] * 3
    for step in points:
        if step == LET_STEPS:
            shutil.rmtree(tmp_path / "teacher")
            flags = {name: value for name, value in plain(flags).items() if name not in BOTH}
        two = tmp_path / f"from {step}"
        train(world_size, **flags, load=one / f"iter_{step:07d}", save=two)
        assert (numbers(two), weights(two), distances(two), total_flops(two)) == (
            numbers(one)[step:],
            weights(one)[step:],
            distances(one)[step:],
            total_flops(one)[step:],
        )
        assert tensors(two, STEPS) == tensors(one, STEPS)
        assert state_of(two, STEPS)["salt"] == state_of(one, STEPS)["salt"] is not None


def test_a_cache_serves_guidance_and_soft_labels_with_the_same_bits(tmp_path: Path, data: str, teacher: Path) -> None:
    """A run with guidance alone fills it. One with both reads it, and needs no layers of the teacher. One without soft labels computes
    nothing."""
    train(**guided(data, teacher, **HIDDEN), save=tmp_path / "fills", teacher_cache=tmp_path / "cache")
    both = guided(data, teacher, **BOTH | dict(let_steps=KD_STEPS))
    train(**both, save=tmp_path / "live")
    warm = train(**both, save=tmp_path / "warm", teacher_cache=tmp_path / "cache")
    assert "the teacher's layers are not loaded" in warm.err
    assert numbers(tmp_path / "warm") == numbers(tmp_path / "live") and weights(tmp_path / "warm") == weights(tmp_path / "live")
    assert tensors(tmp_path / "warm", STEPS) == tensors(tmp_path / "live", STEPS)
    head = GLOBAL_BATCH * SEQ_LENGTH * head_flops(read_teacher(str(teacher)).model, ROWS)
    assert teacher_flops(tmp_path / "warm") == [head] * KD_STEPS + [0.0] * 3
    train(**guided(data, teacher, **HIDDEN), save=tmp_path / "again", teacher_cache=tmp_path / "cache")
    assert numbers(tmp_path / "again") == numbers(tmp_path / "fills") and teacher_flops(tmp_path / "again") == [0.0] * STEPS
    assert tensors(tmp_path / "again", STEPS) == tensors(tmp_path / "fills", STEPS)


def test_a_teacher_without_an_output_layer_is_not_evaluated_and_a_dry_run_tells_what_it_teaches(
    tmp_path: Path, data: str, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = guided(data, teacher, **HIDDEN, valid_share=0.3, eval_iters=1, eval_interval=2, save=tmp_path / "run")
    assert pretrain.main(argv(**flags, dry_run=1)) == 0
    told = capsys.readouterr().out
    line = "stage 1: the teacher's last hidden states in steps 1 to 2, to layer 1 on pipeline stage 0, with weight 0.5 at first, linear"
    assert f"{line}\nstage 1: the teacher is freed after step 2\n" in told
    ended = train(**flags)
    assert (
        line in ended.err and "its recorded losses are not computed, because --guide hidden loads no output layer" in ended.err
    )
    evaluations = entries(tmp_path / "run", "eval")
    assert len(evaluations) == 4 and all("teacher_loss" not in entry for entry in evaluations)
    assert not {"kd_weight", "kl", "ce"} & set(entries(tmp_path / "run")[0])


@pytest.mark.long
def test_another_guidance_takes_an_override(tmp_path: Path, data: str, teacher: Path) -> None:
    train(**guided(data, teacher, **HIDDEN), save=tmp_path / "one", save_interval=1)
    change = guided(data, teacher, **HIDDEN | dict(let_steps=3, let_weight=0.25), load=tmp_path / "one" / "iter_0000001")
    message = refused(**change)
    assert "--let-steps is 2 there and 3 here" in message and "--let-weight is 0.5 there and 0.25 here" in message
    train(**change, override_kd_schedule=True, save=tmp_path / "two")
    assert weights(tmp_path / "two")[2:] == [(None, None)] * 2 and weights(tmp_path / "two")[1][1] == pytest.approx(0.25 / 3)
