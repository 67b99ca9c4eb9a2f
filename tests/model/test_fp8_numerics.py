"""The FP8 emulation of the tests against torch's FP8 product, float64 arithmetic and the laws of the formats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.fp8_emulation import (
    E4M3,
    E5M2,
    Blocks,
    Delayed,
    Fp8Product,
    Quantized,
    Recipe,
    Tensorwise,
    amax_of,
    block_amax,
    largest_of,
    power_of_two_at_most,
    quantize,
    quantize_blocks,
    scale_from,
)  # fmt: skip

DTYPES = [pytest.param(E4M3, id="e4m3"), pytest.param(E5M2, id="e5m2")]
HALF_STEP = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Rounding to nearest is at most so far off, as a share of a normal number."""
HALF_SUBNORMAL = {E4M3: 2.0**-10, E5M2: 2.0**-17}
"""And at most so far, below the smallest normal number, in units of the payload."""


def drawn(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Random numbers; with a large spread their magnitudes differ by many powers of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.exp(spread * torch.randn(*shape, generator=generator))


def tensorwise(tensor: Tensor, dtype: torch.dtype = E4M3) -> Quantized:
    return quantize(tensor, scale_from(amax_of(tensor), dtype), dtype)


# ---- one scale a tensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1.0, 7e4, 1e30])
def test_current_scaling_takes_the_largest_number_to_the_types_largest(dtype: torch.dtype, factor: float) -> None:
    """scale = 448 / amax: the quantized amax is always 448, and dequantizes to amax."""
    tensor = drawn(64, 48, spread=2.0) * factor
    quantized = tensorwise(tensor, dtype)
    amax = tensor.abs().amax()
    assert float(quantized.scale) == pytest.approx(largest_of(dtype) / float(amax), rel=1e-6)
    assert float(quantized.payload.float().abs().amax()) == largest_of(dtype)
    assert float(quantized.back().abs().amax()) == pytest.approx(float(amax), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_every_number_comes_back_to_within_half_a_step(dtype: torch.dtype, spread: float) -> None:
    tensor = drawn(200, 100, seed=1, spread=spread)
    quantized = tensorwise(tensor, dtype)
    bound = torch.maximum(HALF_STEP[dtype] * tensor.abs(), HALF_SUBNORMAL[dtype] / quantized.scale)
    error = (quantized.back() - tensor).abs()
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert bool((error > bound / 2).any()), "the bound is not far from what happens"


@pytest.mark.parametrize("amax, scale", [
    (0.0, 3.0), (math.inf, 3.0), (math.nan, 3.0), (448.0, 1.0), (7.0, 64.0), (1e-42, torch.finfo().max),
])  # fmt: skip
def test_a_scale_needs_an_amax_that_is_a_number_above_0(amax: float, scale: float) -> None:
    """Otherwise the scale keeps its value. It is never infinite."""
    assert float(scale_from(torch.tensor(amax), E4M3, instead=3.0)) == pytest.approx(scale, rel=1e-6)


def test_zeros_stay_zeros_and_numbers_beyond_the_scale_are_cut_off() -> None:
    assert torch.equal(tensorwise(torch.zeros(8, 8)).back(), torch.zeros(8, 8))
    assert quantize(torch.tensor([1e6, -500.0, 448.0]), torch.ones(()), E4M3).back().tolist() == [448.0, -448.0, 448.0]


# ---- products ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", DTYPES)
def test_a_product_is_the_one_of_torchs_fp8_matrix_multiplication(left: torch.dtype) -> None:
    """A gradient in e5m2 or an input in e4m3, multiplied with a weight in e4m3. Results are float32."""
    a, b = drawn(48, 64, seed=2), drawn(32, 64, seed=3)
    qa, qb = tensorwise(a, left), tensorwise(b)
    exact = torch._scaled_mm(qa.payload, qb.payload.t(), scale_a=1 / qa.scale, scale_b=1 / qb.scale, out_dtype=torch.float32)
    torch.testing.assert_close(qa.back() @ qb.back().t(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().amax()))


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise", "mxfp8"])
def test_a_dot_products_error_is_bounded_by_its_operands(kind: str) -> None:
    """|sum a'b' - sum ab| <= sum |a - a'| |b| + |a'| |b - b'| in float64, where rounding is at most half a step of the format."""
    a, b = drawn(96, 256, seed=4), drawn(80, 256, seed=5)
    quantizers = Recipe(kind).quantizers(None)
    a_back, b_back = quantizers[0](a)[0].double(), quantizers[1](b)[0].double()
    a, b = a.double(), b.double()
    step = 2 * HALF_STEP[E4M3] + HALF_STEP[E4M3] ** 2
    below = HALF_SUBNORMAL[E4M3] / 448 * 2  # of the block's largest number, whose scale may be rounded down by almost 2
    slack = below * (a.abs().amax() * b.abs().sum(-1)[None, :] * 2 + b.abs().amax() * a.abs().sum(-1)[:, None] * 2)
    error = (a_back @ b_back.t() - a @ b.t()).abs()
    assert bool((error <= step * (a.abs() @ b.abs().t()) + slack).all())
    typical = error.pow(2).mean().sqrt() / (a @ b.t()).pow(2).mean().sqrt()
    assert 0.01 < float(typical) < 0.06  # and the errors of 256 terms do not add up


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise", "mxfp8"])
def test_forward_and_both_gradients_are_the_products_of_quantized_operands(kind: str) -> None:
    """Operands of a product are quantized along the dimension that the product sums over. Oracle in float64."""
    recipe = Recipe(kind)
    x, weight, d_y = drawn(3, 40, 256, seed=6), drawn(160, 256, seed=7), drawn(3, 40, 160, seed=8)
    x.requires_grad_(), weight.requires_grad_()
    y = Fp8Product.apply(x, weight, recipe.quantizers(None))
    y.backward(d_y)

    def along_last(tensor: Tensor, which: int) -> Tensor:
        return recipe.quantizers(None)[which](tensor)[0].double()

    x2, w, d2 = x.detach().flatten(0, 1), weight.detach(), d_y.flatten(0, 1)
    exact = {
        "y": along_last(x2, 0) @ along_last(w, 1).t(),
        "d_x": along_last(d2, 2) @ along_last(w.t(), 1).t(),
        "d_w": along_last(d2.t(), 2) @ along_last(x2.t(), 0).t(),
    }
    found = {"y": y.detach().flatten(0, 1), "d_x": x.grad.flatten(0, 1), "d_w": weight.grad}
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), exact[name], rtol=1e-4, atol=1e-4 * float(exact[name].abs().amax()), msg=name
        )
    unquantized = {"y": x2 @ w.t(), "d_x": d2 @ w, "d_w": d2.t() @ x2}
    for name, value in found.items():
        error = (value - unquantized[name]).norm() / unquantized[name].norm()
        assert 0.01 < float(error) < {"y": 0.06, "d_x": 0.09, "d_w": 0.09}[name], (name, error)


# ---- a history of maxima -----------------------------------------------------------------------------------------------------

AMAXES = [1.0, 3.0, 0.0, 100.0, 2.0, math.inf, 0.5, 0.5, 0.5, 0.5, 1e-3, 0.0, 0.0, 0.0, 8.0, 4.0]


def scales_by_hand(amaxes: list[float], length: int, algorithm: str, margin: int) -> list[float]:
    """The scale after each step, from the last `length` maxima, computed with lists in float64."""
    scale, scales = 1.0, []
    for step in range(len(amaxes)):
        window = amaxes[max(0, step + 1 - length) : step + 1]
        amax = max(window) if algorithm == "max" else window[-1]
        if 0 < amax < math.inf:
            scale = 448 / amax / 2**margin
        scales.append(scale)
    return scales


@pytest.mark.parametrize("length", [1, 2, 4, 16])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
def test_delayed_scaling_follows_the_window_of_maxima(length: int, algorithm: str, margin: int) -> None:
    """An amax of 0 or infinity does not change the scale, but takes a place in the window."""
    quantizer = Delayed(E4M3, length, algorithm, margin)
    scales = []
    for amax in AMAXES:
        quantizer(torch.tensor([[amax, -amax / 2]]))
        quantizer.update()
        scales.append(float(quantizer.scale))
    assert scales == pytest.approx(scales_by_hand(AMAXES, length, algorithm, margin), rel=1e-6)


def test_delayed_scaling_uses_the_scale_of_before_and_cuts_off_what_has_grown() -> None:
    quantizer = Delayed(E4M3, 4, "max", margin=0)
    quantizer(torch.tensor([[1.0]]))
    quantizer.update()
    assert float(quantizer(torch.tensor([[5.0]]))[0]) == 1.0
    quantizer.update()
    assert float(quantizer(torch.tensor([[5.0]]))[0]) == 5.0
    roomy = Delayed(E4M3, 4, "max", margin=3)
    roomy(torch.tensor([[1.0]]))
    roomy.update()
    assert float(roomy(torch.tensor([[5.0]]))[0]) == pytest.approx(5.0, rel=HALF_STEP[E4M3])


def test_scales_that_are_never_updated_lose_small_numbers_and_cut_off_large_ones() -> None:
    """In a frozen model delayed scales stay 1. Then weights of an output projection (0.02 / sqrt(2 x 32 layers)) are subnormal,
    and the largest activations of an MLP are above 448."""
    for tensor, least in (
        (0.0025 * drawn(256, 256, seed=9, spread=0.0), 0.2),
        (2000 * drawn(256, 256, seed=9, spread=0.0), 0.5),
    ):
        stale, current = Delayed(E4M3, 16, "max", margin=0), Tensorwise(E4M3)
        stale(tensor)  # an update would follow here, were gradients enabled
        assert float((stale(tensor)[0] - tensor).norm() / tensor.norm()) > least
        assert float((current(tensor)[0] - tensor).norm() / tensor.norm()) < 0.03
        stale.update()
        assert float((stale(tensor)[0] - tensor).norm() / tensor.norm()) < 0.03


# ---- a scale a block -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(1, 32), (1, 128), (128, 128), (128, 1)])
def test_each_block_has_a_power_of_two_that_uses_the_type_and_does_not_overflow(rows: int, columns: int) -> None:
    """Blocks at the ends are shorter. e8m0, the format in which mxfp8 stores scales, holds each scale exactly."""
    tensor = drawn(200, 300, seed=10, spread=2.0)
    quantized = quantize_blocks(tensor, rows, columns, E4M3)
    for top in range(0, 200, rows):
        for left in range(0, 300, columns):
            block = (slice(top, top + rows), slice(left, left + columns))
            scale = quantized.scale[block]
            assert bool((scale == scale.flatten()[0]).all())
            assert 224 < float(scale.flatten()[0] * tensor[block].abs().amax()) <= 448
    assert torch.equal(quantized.scale.to(torch.float8_e8m0fnu).float(), quantized.scale)
    assert torch.equal(
        quantized.scale, torch.exp2(torch.floor(torch.log2(448 / block_amax(tensor, rows, columns).double()))).float()
    )


def test_powers_of_two_are_rounded_down() -> None:
    assert power_of_two_at_most(torch.tensor([1.0, 1.99, 2.0, 0.3, 448.0])).tolist() == [1.0, 1.0, 2.0, 0.25, 256.0]


@pytest.mark.parametrize("kind, unharmed", [("tensorwise", False), ("blockwise", True), ("mxfp8", True)])
def test_an_outlier_harms_its_block_alone(kind: str, unharmed: bool) -> None:
    """With one scale for the whole tensor, numbers 2^24 below the outlier would become 0."""
    tensor = drawn(4, 512, seed=11)
    tensor[0, 0] = 2.0**24
    back = Recipe(kind).quantizers(None)[0](tensor)[0]
    elsewhere = (back - tensor)[:, 128:]
    assert (float(elsewhere.norm() / tensor[:, 128:].norm()) < 0.04) == unharmed
    assert back[0, 0] == tensor[0, 0] and float((back - tensor)[0, 1:32].norm() / tensor[0, 1:32].norm()) > 0.2


def test_a_square_block_reads_the_same_in_both_directions_and_a_row_does_not() -> None:
    """So a blockwise weight is quantized once, but an input or an mxfp8 weight twice."""
    tensor = drawn(256, 384, seed=12)
    for quantizer, same in ((Blocks(E4M3, 128, 128), True), (Blocks(E4M3, 1, 128), False), (Blocks(E4M3, 1, 32), False)):
        rows, columns = quantizer(tensor)
        assert torch.equal(rows, columns) == same
        assert torch.equal(quantizer(tensor.t().contiguous())[0].t(), columns)
