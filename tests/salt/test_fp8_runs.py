"""A run whose teacher multiplies in FP8, the whole program: verified in bfloat16, let through by the gate, its bfloat16 weights dropped.

Transformer Engine's part alone is replaced, by the emulation: the body's linears, and what makes FP8 of their weights for good.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_salt.config import SaltConfig
from megatron_salt.model.gpt import GPT
from megatron_salt.salt import load_teacher
from tests.support.fp8_emulation import Emulation, Recipe, emulate
from tests.support.program import entries, losses, numbers, refused, train, write_tokens

STEPS, KD_STEPS = 5, 3
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words", windows=400)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A teacher that has learnt the words of the data."""
    save = tmp_path_factory.mktemp("teacher")
    train(
        data_path=data,
        train_iters=150,
        lr=1e-2,
        bf16=True,
        micro_batch_size=8,
        untie_embeddings_and_output_weights=True,
        save=save,
    )
    assert losses(save)[150] < 1.5 < losses(save)[1] - 3
    return save


@contextlib.contextmanager
def fp8_teachers(recipe: Recipe, spoil: Callable[[Emulation], None] = lambda emulation: None) -> Iterator[None]:
    """Every teacher that is loaded inside has a body in emulated FP8. `spoil` is called on it after its weights were verified."""
    build, of_body = load_teacher.build_body, {}

    def built(*arguments: Any) -> GPT:
        body = build(*arguments)
        of_body[body] = emulate(body, recipe)
        body.forward_context = of_body[body].products
        body.precision = replace(body.precision, fp8_format="hybrid", fp8_recipe=recipe.kind, forward_only=True)
        return body

    def verified(*arguments: Any) -> None:
        verify(*arguments)
        for emulation in of_body.values():
            spoil(emulation)

    def kept(body: GPT) -> None:
        of_body[body].keep_fp8_alone()
        body.fp8_alone = True

    verify = load_teacher.verify
    with (
        mock.patch.object(load_teacher, "build_body", built),
        mock.patch.object(load_teacher, "verify", verified),
        mock.patch.object(load_teacher, "keep_fp8_alone", kept),
    ):
        yield


def salt(data: str, teacher: Path, **flags: Any) -> dict[str, Any]:
    return dict(data_path=data, train_iters=STEPS, teacher_load=teacher, kd_steps=KD_STEPS, bf16=True) | flags


ONE = (1, {})
PP2_TP2 = (2, dict(PP2, teacher_tensor_model_parallel_size=2))
TP2_PP2 = (2, dict(TP2, teacher_pipeline_model_parallel_size=2))


@pytest.mark.parametrize("kind, world_size, flags", [
    pytest.param("blockwise", *ONE, id="blockwise"),
    pytest.param("mxfp8", *TP2_PP2, id="mxfp8, tp2, teacher pp2"),
    pytest.param("blockwise", *PP2_TP2, id="blockwise, pp2, teacher tp2", marks=pytest.mark.full),
    pytest.param("tensorwise", *TP2_PP2, id="tensorwise, tp2, teacher pp2", marks=pytest.mark.full),
    pytest.param("tensorwise", *PP2_TP2, id="tensorwise, pp2, teacher tp2"),
])  # fmt: skip
def test_a_student_learns_from_an_fp8_teacher_as_from_one_in_bfloat16(
    tmp_path: Path, data: str, teacher: Path, kind: Any, world_size: int, flags: dict[str, Any]
) -> None:
    flags = salt(data, teacher, **flags)
    train(world_size, **flags, save=tmp_path / "bf16")
    train(world_size, **flags, save=tmp_path / "fp8", within=functools.partial(fp8_teachers, Recipe(kind)))
    [told] = [entry["teacher_fp8"] for entry in entries(tmp_path / "fp8", "event") if "teacher_fp8" in entry]
    assert 1e-6 < told["kl"] < told["max_kl"] == SaltConfig().teacher_fp8_max_kl
    assert not [entry for entry in entries(tmp_path / "bf16", "event") if "teacher_fp8" in entry]
    stage1 = [[entry for entry in entries(tmp_path / name) if "kd_weight" in entry] for name in ("bf16", "fp8")]
    assert len(stage1[0]) == len(stage1[1]) == KD_STEPS
    for plain, fp8 in zip(*stage1, strict=True):
        assert fp8["teacher_ce"] != plain["teacher_ce"] == pytest.approx(fp8["teacher_ce"], rel=0.02)
        assert fp8["loss"] == pytest.approx(plain["loss"], rel=0.01)
    assert losses(tmp_path / "fp8")[STEPS] == pytest.approx(losses(tmp_path / "bf16")[STEPS], rel=0.01)


def test_a_teacher_of_weight_0_in_fp8_changes_no_bit_of_the_student(tmp_path: Path, data: str, teacher: Path) -> None:
    flags = salt(data, teacher, **PP2, kd_weight=0.0)
    without = {name: value for name, value in flags.items() if name not in ("teacher_load", "kd_steps", "kd_weight")}
    train(2, **without, save=tmp_path / "plain")
    train(2, **flags, save=tmp_path / "fp8", within=functools.partial(fp8_teachers, Recipe()))
    assert losses(tmp_path / "fp8") == losses(tmp_path / "plain")


@pytest.mark.full
def test_a_cache_of_an_fp8_teacher_gives_the_same_bits(tmp_path: Path, data: str, teacher: Path) -> None:
    """One scale serves all samples of a forward pass, so they must come in the same company."""
    flags, within = salt(data, teacher, **PP2), functools.partial(fp8_teachers, Recipe("tensorwise"))
    for name in ("cold", "warm"):
        train(2, **flags, save=tmp_path / name, teacher_cache=tmp_path / "cache", within=within)
    assert numbers(tmp_path / "warm") == numbers(tmp_path / "cold")
    assert [entry.get("teacher_cached") for entry in entries(tmp_path / "warm")] == [1.0] * KD_STEPS + [None] * (
        STEPS - KD_STEPS
    )


def test_a_resumed_run_has_the_same_teacher_again(tmp_path: Path, data: str, teacher: Path) -> None:
    """The teacher is loaded and checked again; the result is the same bit for bit."""
    flags, within = salt(data, teacher, **PP2), functools.partial(fp8_teachers, Recipe())
    train(2, **flags, save=tmp_path / "one", save_interval=2, within=within)
    train(2, **flags, save=tmp_path / "two", load=tmp_path / "one" / "iter_0000002", within=within)
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")[2:]


class Halved:
    """Damage: a quantizer has a wrong scale."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __call__(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self.quantizer(tensor)
        return rows / 2, columns / 2


def of_a_wrong_scale(emulation: Emulation) -> None:
    for linear in emulation.linears:
        linear.quantizers = (linear.quantizers[0], Halved(linear.quantizers[1]), linear.quantizers[2])


def small_beside_their_inputs(emulation: Emulation) -> None:
    """The same function with other numbers: the MLP's inner activations are 2^10 times as large, its output weight is smaller."""
    with torch.no_grad():
        for linear in emulation.linears:
            if type(linear).__name__ == "Row" and linear.input_size != linear.output_size:
                linear.weight /= 1024
            elif type(linear).__name__ == "Column" and linear.output_size == 2 * 64:
                linear.weight[64:] *= 1024


@pytest.mark.parametrize("recipe, spoil", [
    pytest.param(Recipe(), of_a_wrong_scale, id="a wrong scale"),
    pytest.param(Recipe("delayed"), small_beside_their_inputs, id="scales never updated"),
])  # fmt: skip
def test_a_spoiled_fp8_teacher_ends_the_run_before_it_begins(
    tmp_path: Path, data: str, teacher: Path, recipe: Recipe, spoil: Callable[[Emulation], None]
) -> None:
    flags = salt(data, teacher, **PP2, save=tmp_path)
    message = refused(2, **flags, within=functools.partial(fp8_teachers, recipe, spoil))
    assert f"--teacher-fp8-max-kl {SaltConfig().teacher_fp8_max_kl:g}" in message and "nats a token" in message
    assert not list(tmp_path.glob("iter_*"))


def test_other_numbers_for_the_same_function_do_no_harm_to_current_scales(tmp_path: Path, data: str, teacher: Path) -> None:
    """What the stale scales were refused for."""
    train(
        2,
        **salt(data, teacher, **PP2, save=tmp_path),
        within=functools.partial(fp8_teachers, Recipe(), small_beside_their_inputs),
    )
