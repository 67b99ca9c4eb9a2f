"""The program with a gate and with schedules of the teacher's weight and temperature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.program import checkpoints, entries, numbers, refused, state_of, tensors, train, write_tokens

STEPS = 4
SCHEDULES = dict(kd_weight_schedule=["1:0.8", "3:0.4"], kd_temperature_schedule=["1:0.5", "2:1.0"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A narrower model, which the program trained for some steps."""
    save = tmp_path_factory.mktemp("teacher")
    narrow = dict(hidden_size=16, ffn_hidden_size=48, untie_embeddings_and_output_weights=True)
    train(data_path=data, **narrow, train_iters=6, lr=3e-2, save=save)
    return save


@pytest.fixture(scope="module")
def flags(data: str, teacher: Path) -> dict[str, Any]:
    """Of a run of four steps, of which three have the teacher."""
    return dict(data_path=data, train_iters=STEPS, teacher_load=teacher, kd_steps=3)


def test_a_run_with_gate_and_schedules_logs_them_and_resumes_bit_for_bit(tmp_path: Path, flags: dict[str, Any]) -> None:
    """Two ranks split the vocabulary. Stage 1 knows what it began with, and takes another gate as an override alone."""
    flags = flags | SCHEDULES | dict(tensor_model_parallel_size=2, sequence_parallel=True, kd_gate="rank:5")
    one, two = tmp_path / "one", tmp_path / "two"
    ended = train(2, **flags, save=one, save_interval=1)
    logged = entries(one)
    assert [entry["kd_weight"] for entry in logged[:3]] == pytest.approx([0.8, 0.6, 0.4])
    assert [entry["kd_temperature"] for entry in logged[:3]] == [0.5, 1.0, 1.0]
    assert all(0 < entry["taught"] < 1 for entry in logged[:3]) and "taught" in ended.out
    assert not {"kd_weight", "kd_temperature", "taught"} & logged[3].keys()
    schedule = state_of(one, STEPS)["salt"]["schedule"]
    assert (schedule["kd_gate"], schedule["kd_weight_schedule"]) == ("rank:5", "1:0.8 3:0.4")
    train(2, **flags, load=one / "iter_0000002", save=two)
    assert numbers(two) == numbers(one)[2:] and tensors(two, STEPS) == tensors(one, STEPS)
    assert [entry["taught"] for entry in entries(two)[:1]] == [logged[2]["taught"]]
    changed = flags | dict(load=one / "iter_0000002", kd_gate="rank:3")
    assert "--kd-gate is rank:5 there and rank:3 here" in refused(2, **changed, save=tmp_path / "three")


def test_no_gate_and_constant_schedules_change_no_bit(tmp_path: Path, flags: dict[str, Any]) -> None:
    """Neither does a gate that no label passes change a bit of the plain loss."""
    evaluated = dict(valid_share=0.3, eval_iters=1, eval_interval=2)
    constant = dict(kd_gate="none", kd_weight_schedule=["2:0.667", "3:0.667"], kd_temperature_schedule=["1:0.25"])
    shut = dict(kd_gate="probability:0.9999999")
    for name, more in dict(plain={}, constant=constant, shut=shut, unweighted=dict(kd_weight=0.0)).items():
        train(**flags, **evaluated, **more, save=tmp_path / name)
    for one, other in (("plain", "constant"), ("unweighted", "shut")):
        assert numbers(tmp_path / one) == numbers(tmp_path / other)
        assert tensors(tmp_path / one, STEPS) == tensors(tmp_path / other, STEPS)
        assert [entry["loss"] for entry in entries(tmp_path / one, "eval")] == [
            entry["loss"] for entry in entries(tmp_path / other, "eval")
        ]
    assert [entry["taught"] for entry in entries(tmp_path / "shut")[:3]] == [0.0] * 3
    assert numbers(tmp_path / "plain") != numbers(tmp_path / "shut")
    assert (
        "taught" not in entries(tmp_path / "plain")[0]
        and "kd_gate" not in state_of(tmp_path / "plain", STEPS)["salt"]["schedule"]
    )


@pytest.mark.parametrize("dry", [{}, dict(dry_run=1)], ids=["a run", "a dry run"])
@pytest.mark.parametrize("gate, told", [
    ("rank:100000", "--kd-gate rank:100000 lets every token through"),
    ("entropy:50", "--kd-gate entropy:50 lets every token through"),
])  # fmt: skip
def test_a_gate_that_lets_every_token_through_is_refused(
    tmp_path: Path, flags: dict[str, Any], dry: dict[str, Any], gate: str, told: str
) -> None:
    message = refused(**flags, **dry, kd_gate=gate, save=tmp_path / "save")
    assert told in message and "--kd-gate none" in message
    assert not (tmp_path / "save").exists() or checkpoints(tmp_path / "save") == []
