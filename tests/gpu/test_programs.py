"""The whole programs on one GPU: a run with a teacher, in bfloat16 and in FP8, its memory before and after the switch; scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_salt.model.precision import Fp8Recipe
from tests.gpu.checks import ENGINE, RECIPES, assert_same_scores, in_fp8, skip_unless
from tests.gpu.ranks import on_cpu, program
from tests.support import scoring
from tests.support.program import argv, entries, losses, write_tokens

pytestmark = pytest.mark.gpu

MODEL: dict[str, Any] = dict(
    num_layers=4, hidden_size=256, ffn_hidden_size=512, untie_embeddings_and_output_weights=True, seq_length=128, bf16=True, lr=3e-3,
    loss_chunk_tokens=None,
)  # fmt: skip
LINEAR_WEIGHTS = 4 * (256 * (2 * 256 + 2 * 128) + 3 * 256 * 512)
TEACHER_BYTES = 2 * (LINEAR_WEIGHTS + 2 * 384 * 256)  # the vocabulary is padded to 384
STEPS, KD_STEPS = 40, 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words", windows=2000)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    save = tmp_path_factory.mktemp("teacher")
    program("megatron_salt.pretrain", argv(**MODEL, data_path=data, train_iters=100, save=save))
    return save


def salt(save: Path, data: str, teacher: Path, **flags: Any) -> dict[str, Any]:
    """A run with a teacher of the student's own size; the event of its switch."""
    program("megatron_salt.pretrain", argv(**MODEL, data_path=data, train_iters=STEPS, kd_steps=KD_STEPS, teacher_load=teacher, save=save,
                                           **flags))  # fmt: skip
    [switch] = [entry for entry in entries(save, "event") if entry.get("stage") == 2]
    return switch


def freed(switch: dict[str, Any]) -> float:
    """Bytes."""
    return (switch["memory_gib_before"] - switch["memory_gib_after"]) * 2**30


@pytest.mark.parametrize("implementation", ["torch", "transformer_engine"])
def test_the_switch_to_stage_2_gives_back_the_teachers_memory(
    tmp_path: Path, data: str, teacher: Path, implementation: str
) -> None:
    if implementation == "transformer_engine":
        skip_unless(ENGINE)
    assert freed(salt(tmp_path, data, teacher, transformer_impl=implementation)) >= 0.98 * TEACHER_BYTES


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "delayed"])
def test_a_teacher_in_fp8_passes_its_gate_takes_less_memory_and_teaches_as_in_bfloat16(
    tmp_path: Path, data: str, teacher: Path, recipe: Fp8Recipe
) -> None:
    skip_unless(in_fp8(recipe))
    in_bf16 = salt(tmp_path / "bf16", data, teacher, transformer_impl="transformer_engine")
    quantized = salt(tmp_path / "fp8", data, teacher, transformer_impl="transformer_engine", teacher_fp8_format="hybrid",
                     teacher_fp8_recipe=recipe)  # fmt: skip
    [told] = [entry["teacher_fp8"] for entry in entries(tmp_path / "fp8", "event") if "teacher_fp8" in entry]
    assert 0 < told["kl"] < told["max_kl"]
    assert freed(in_bf16) - freed(quantized) > 0.9 * LINEAR_WEIGHTS  # a byte a weight
    stage1 = [[entry["teacher_ce"] for entry in entries(tmp_path / name) if "teacher_ce" in entry] for name in ("bf16", "fp8")]
    assert len(stage1[0]) == KD_STEPS and stage1[1] == pytest.approx(stage1[0], rel=0.02)
    assert losses(tmp_path / "fp8")[STEPS] == pytest.approx(losses(tmp_path / "bf16")[STEPS], rel=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_student_in_fp8_saves_resumes_and_learns(tmp_path: Path, data: str, recipe: Fp8Recipe) -> None:
    """As the one in bfloat16, to a twentieth of its loss; and its checkpoint goes on without FP8 and on torch's layers."""
    skip_unless(in_fp8(recipe))
    history = dict(fp8_amax_history_len=16, fp8_amax_compute_algo="max") if recipe == "delayed" else {}
    ways: dict[str, dict[str, Any]] = {
        "fp8": dict(transformer_impl="transformer_engine", fp8_format="hybrid", fp8_recipe=recipe, **history),
        "bf16": dict(transformer_impl="transformer_engine"),
        "torch": dict(transformer_impl="torch"),
    }
    for name in ("bf16", "fp8"):
        program("megatron_salt.pretrain", argv(**MODEL, data_path=data, train_iters=STEPS, save_interval=20, save=tmp_path / name,
                                               **ways[name]))  # fmt: skip
    fp8, bf16 = losses(tmp_path / "fp8"), losses(tmp_path / "bf16")
    assert fp8 != bf16 and bf16[1] - bf16[STEPS] > 2
    assert [fp8[step] for step in fp8] == pytest.approx([bf16[step] for step in fp8], rel=0.05)
    for name in ways:
        resumed = tmp_path / f"fp8, then {name}"
        program("megatron_salt.pretrain", argv(**MODEL, data_path=data, train_iters=STEPS, load=tmp_path / "fp8" / "iter_0000020",
                                               save=resumed, **ways[name]))  # fmt: skip
        assert losses(resumed)[STEPS] == pytest.approx(fp8[STEPS], rel=0.05)


def test_scores_are_those_of_the_cpu(tmp_path: Path, data: str, teacher: Path) -> None:
    """In float32 on both: but for a window in a hundred, where a token changes its rank, to a thousandth of a nat."""
    flags = dict(teacher_load=teacher, data_path=data, dtype="float32")
    program("tools.score_data", scoring.argv(**flags, output=tmp_path / "gpu"))
    [ended] = on_cpu(1, scoring.main, scoring.argv(**flags, output=tmp_path / "cpu"))
    assert ended.status == 0, ended
    assert_same_scores(tmp_path / "gpu", tmp_path / "cpu")
