"""FP8's emulation (tests/support/fp8_emulation.py) against what Transformer Engine does in Python: its reference for current scaling, and
the update of delayed scales."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.fp8_emulation import E4M3, E5M2, Delayed, Tensorwise, largest_of
from tests.te import engine  # noqa: F401  (skips where Transformer Engine is not installed)

AMAXES = [1.0, 3.0, 0.0, 100.0, 2.0, math.inf, 0.5, 0.5, 0.5, 0.5, 1e-3, 0.0, 0.0, 0.0, math.nan, 8.0, 4.0]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e5])
def test_current_scaling_is_its_references(dtype: torch.dtype, factor: float) -> None:
    """To the bit of each FP8 number, in both orientations."""
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    tensor = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * factor
    reference = CurrentScalingQuantizerRef(dtype=dtype, rowwise=True, columnwise=True, pow_2_scales=False, eps=0.0).quantize(
        tensor
    )
    ours = Tensorwise(dtype).rows(tensor)
    assert torch.equal(ours.payload.view(torch.uint8), reference.data.view(torch.uint8))
    assert torch.equal(ours.payload.t().contiguous().view(torch.uint8), reference.data_t.contiguous().view(torch.uint8))
    torch.testing.assert_close(1 / ours.scale, reference.scale.reshape(()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length, margin", [(1, 0), (4, 0), (16, 3)])
def test_delayed_scales_move_as_its_own(algorithm: str, length: int, margin: int) -> None:
    """Over maxima of 0, infinity and NaN too."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    recipe = DelayedScaling(amax_history_len=length, amax_compute_algo=algorithm, margin=margin)
    history, scale = torch.zeros(length, 1), torch.ones(1)
    ours = Delayed(E4M3, length, algorithm, margin)
    for amax in AMAXES:
        history[0] = amax
        _amax_and_scale_update(history, scale, largest_of(E4M3), recipe)
        ours(torch.tensor([[amax]]))
        ours.update()
        torch.testing.assert_close(ours.scale.reshape(1), scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.history, history[:, 0], equal_nan=True)
