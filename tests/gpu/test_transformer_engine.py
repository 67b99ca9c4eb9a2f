"""Transformer Engine's layers and FP8 on one GPU: against the torch layers, from the same weights, on the same batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_salt.model.precision import Fp8Recipe
from tests.gpu.checks import ENGINE, RECIPES, WIDE, curve, in_fp8, skip_unless
from tests.gpu.ranks import on_cpu
from tests.support.small import MODELS, Case, make_weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("world")]

STEPS = 60
FP8 = Case(model=WIDE, dtype=torch.bfloat16, micro_batch_size=4, learning_rate=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_its_layers_compute_what_torchs_do(tmp_path: Path, name: str) -> None:
    """Forward: the first loss. Backward: the first gradient norm. And three steps on."""
    skip_unless(ENGINE)
    case = Case(model=MODELS[name], dtype=torch.bfloat16)
    on_cpu(1, make_weights, case, tmp_path / "weights")
    plain, engine = (curve(one, tmp_path / "weights", 3) for one in (case, replace(case, precision=ENGINE)))
    assert engine.losses == pytest.approx(plain.losses, rel=5e-3)
    assert engine.grad_norms == pytest.approx(plain.grad_norms, rel=5e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_in_fp8_follows_the_one_in_bfloat16(tmp_path: Path, recipe: Fp8Recipe) -> None:
    skip_unless(in_fp8(recipe))
    on_cpu(1, make_weights, FP8, tmp_path / "weights")
    bf16, fp8 = (
        curve(replace(FP8, precision=precision), tmp_path / "weights", STEPS) for precision in (ENGINE, in_fp8(recipe))
    )
    assert bf16.losses[0] - bf16.losses[-1] > 1, "nothing was learnt"
    assert fp8.losses != bf16.losses
    assert fp8.losses == pytest.approx(bf16.losses, abs=0.1)
    assert sum(fp8.losses[-10:]) / 10 == pytest.approx(sum(bf16.losses[-10:]) / 10, rel=0.01)
